"""The service: requests become jobs of the list, which one worker does. FastAPI, because one machine is what it serves; for many,
`mifo cluster` does the same jobs. The list is a file (SQLite), so jobs survive a restart.
"""

# no `from __future__ import annotations`: FastAPI reads the annotations of functions inside functions

import base64
import binascii
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Header, HTTPException, Request, Response
from fastapi import Path as InPath
from fastapi.responses import FileResponse, JSONResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from .. import __version__
from ..boxes import Box, parse_boxes_alone
from ..bundle.catalogue import list_bundles
from ..bundle.shelf import check_name
from ..data.instance import MAX_ASSETS
from ..errors import InputError
from ..io.files import write_file
from ..io.image_file import open_image
from ..io.json_text import json_text
from ..io.local_only import local_only
from ..io.terminal import without_folders
from ..jobs.job import EditJob, Job, LearnJob, SynthesizeJob
from ..jobs.store import DONE, Entry, JobStore, QueueFull
from ..jobs.uploads import new_photo, new_upload
from ..jobs.worker import LIST
from .access import Rate, whose

MOST_BYTES = 1 << 26  # of a request
Name = Annotated[str, Field(min_length=1, max_length=100)]
Prompt = Annotated[str, Field(min_length=1, max_length=2000)]


def _whole(value: Any) -> Any:
    """4.0 is an integer in JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Seed = Annotated[int, Field(ge=0, le=2**53), BeforeValidator(_whole)]
Count = Annotated[int, Field(ge=1, le=16), BeforeValidator(_whole)]
Steps = Annotated[int, Field(ge=1, le=1000), BeforeValidator(_whole)]
Scale = Annotated[float, Field(ge=0, le=100)]
Corner = Annotated[float, Field(ge=0, le=1)]
OneBox = Annotated[list[Corner], Field(min_length=4, max_length=4)]
Encoded = Annotated[str, Field(min_length=1, max_length=MOST_BYTES, description="A PNG, JPEG or WebP file, in base64.")]
Number = Annotated[int, InPath(ge=1, le=2**53)]


class Asked(BaseModel):
    """Fields that nobody knows are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)


class ToSynthesize(Asked):
    prompt: Prompt
    bundles: Annotated[list[Name], Field(max_length=8)] = []
    boxes: Annotated[list[OneBox], Field(max_length=16)] | None = None
    seed: Seed = 0
    num_images: Count = 1
    steps: Steps | None = None
    guidance_scale: Scale | None = None
    negative_prompt: Annotated[str, Field(max_length=2000)] = ""
    contrast_scale: Annotated[float, Field(ge=0, le=10, description="How far each box is led away from the other things.")] = 0


class ToEdit(Asked):
    prompt: Prompt
    image: Encoded
    mask: Encoded
    bundles: Annotated[list[Name], Field(max_length=8)] = []
    boxes: Annotated[list[OneBox], Field(max_length=16)] | None = None
    seed: Seed = 0
    num_images: Count = 1
    steps: Steps | None = None


class ToLearn(Asked):
    name: Name
    image: Encoded
    masks: Annotated[list[Encoded], Field(min_length=1, max_length=16)]
    words: Annotated[list[Annotated[str, Field(min_length=1, max_length=60)]], Field(max_length=16)] = []
    seed: Seed = 0


class Accepted(BaseModel):
    id: int


class Progress(BaseModel):
    what: str
    done: int
    total: int


class Shown(BaseModel):
    id: int
    kind: Literal["synthesize", "edit", "learn", "evaluate"]
    state: Literal["queued", "running", "done", "failed", "cancelled"]
    progress: Progress | None = None
    images: list[str] = Field(default=[], description="Where each picture can be fetched.")
    bundle: str | None = Field(default=None, description="What was learned.")
    error: str | None = None


class ShownBundle(BaseModel):
    name: str
    tokens: list[str]
    words: list[str]
    base: str
    learned: str
    mib: float


class Told(BaseModel):
    detail: str


class Limits(BaseModel):
    """What one service takes."""

    most_queued: int = 1000
    most_a_minute: int = 600
    most_bytes: int = MOST_BYTES


REFUSED: dict[int | str, dict[str, Any]] = {
    401: {"model": Told, "description": "The key is missing or wrong."},
    411: {"model": Told, "description": "The request does not say how long it is."},
    413: {"model": Told, "description": "The request is too large."},
    429: {"model": Told, "description": "Too many requests, or too many jobs wait."},
}
CANNOT: dict[int | str, dict[str, Any]] = {
    400: {"model": Told, "description": "The body is no JSON."},
    404: {"model": Told, "description": "There is no such bundle or job."},
    409: {"model": Told, "description": "Well formed, but it cannot be done: a picture that is none, a name that is taken."},
}


def make_service(state: Path, bundles: Path, output: Path, model: str | None = None, keys: dict[str, str] | None = None,
                 limits: Limits | None = None) -> FastAPI:  # fmt: skip
    """The application; a worker on `state` has to run beside it. `keys` as `access.read_keys` gives them; without any it answers
    requests to this machine's own names alone."""
    limits, keys = limits or Limits(), keys or {}
    store, rate = JobStore(state / LIST), Rate(limits.most_a_minute)
    service = FastAPI(title="mifo", version=__version__, docs_url=None, redoc_url=None,
                      middleware=None if keys else [local_only()])  # fmt: skip

    def owner_of(x_api_key: Annotated[str | None, Header()] = None) -> str:
        owner = whose(keys, x_api_key)
        if owner is None:
            raise HTTPException(401, "give your key as the header X-API-Key")
        wait = rate.wait_for(owner)
        if wait:
            raise HTTPException(429, f"at most {limits.most_a_minute} requests a minute; try again later",
                                {"Retry-After": str(int(wait) + 1)})  # fmt: skip
        return owner

    Owner = Annotated[str, Depends(owner_of)]

    @service.middleware("http")
    async def limit_size(request: Request, proceed: Callable[[Request], Awaitable[Response]]) -> Response:
        length = request.headers.get("content-length", "")
        if request.method in ("POST", "PUT", "PATCH"):
            if not length.isdigit():
                return JSONResponse({"detail": "say how long the request is, in Content-Length"}, 411)
            if int(length) > limits.most_bytes:
                return JSONResponse({"detail": f"at most {limits.most_bytes} bytes are taken"}, 413)
        return await proceed(request)

    @service.exception_handler(InputError)
    async def refuse(request: Request, error: InputError) -> JSONResponse:
        status = 429 if isinstance(error, QueueFull) else 409
        return JSONResponse({"detail": without_folders(str(error))}, status, {"Retry-After": "30"} if status == 429 else None)

    def add(job: Job, owner: str) -> Accepted:
        return Accepted(id=store.add(job, owner, limits.most_queued))

    def check_bundles(names: list[str]) -> tuple[str, ...]:
        there = {entry.name for entry in list_bundles(bundles) if not entry.problem}
        for name in names:
            if name not in there:
                raise HTTPException(404, f"there is no bundle {name[:100]!r}; GET /bundles lists them")
        return tuple(names)

    def entry_of(number: int, owner: str) -> Entry:
        entry = store.get(number)
        if entry is None or (keys and entry.owner != owner):  # somebody else's is nobody's
            raise HTTPException(404, f"there is no job {number}")
        return entry

    @service.post("/synthesize", status_code=202, responses={**REFUSED, **CANNOT})
    def synthesize(asked: ToSynthesize, owner: Owner) -> Accepted:
        """Draws pictures; GET /jobs/{id} says when they are there."""
        job = SynthesizeJob(asked.prompt, check_bundles(asked.bundles), boxes_text(asked.boxes), asked.seed, asked.num_images,
                            None, asked.steps, asked.guidance_scale, asked.negative_prompt or None,
                            contrast_scale=asked.contrast_scale or None, model=model)  # fmt: skip
        return add(job, owner)

    @service.post("/edit", status_code=202, responses={**REFUSED, **CANNOT})
    def edit(asked: ToEdit, owner: Owner) -> Accepted:
        """Draws into the masked part of a picture."""
        names, boxes = check_bundles(asked.bundles), boxes_text(asked.boxes)
        image, mask = (keep_upload(state, data, what) for data, what in ((asked.image, "image"), (asked.mask, "mask")))
        return add(EditJob(asked.prompt, str(image), str(mask), names, boxes, asked.seed, asked.num_images, asked.steps,
                           model=model), owner)  # fmt: skip

    @service.post("/learn", status_code=202, responses={**REFUSED, **CANNOT})
    def learn(asked: ToLearn, owner: Owner) -> Accepted:
        """Learns each masked thing of a photo."""
        name = check_name(asked.name)
        if (bundles / name).exists():
            raise InputError(f"there is a bundle called {name} already; choose another name")
        return add(LearnJob(str(keep_instance_upload(state, asked)), name, model or "toybox", asked.seed), owner)

    @service.get("/jobs/{number}", responses={**REFUSED, 404: CANNOT[404]})
    def job(number: Number, owner: Owner) -> Shown:
        return shown(entry_of(number, owner))

    @service.delete("/jobs/{number}", responses={**REFUSED, 404: CANNOT[404]})
    def stop(number: Number, owner: Owner) -> Shown:
        """A job that waits is cancelled; one that runs stops after its step."""
        entry_of(number, owner)
        store.stop(number)
        return shown(entry_of(number, owner))

    @service.get("/jobs/{number}/images/{index}", response_class=FileResponse,
                 responses={**REFUSED, 404: CANNOT[404], 200: {"content": {"image/png": {}}}})  # fmt: skip
    def image(number: Number, index: Annotated[int, InPath(ge=0, le=10_000)], owner: Owner) -> FileResponse:
        entry = entry_of(number, owner)
        images = (entry.result or {}).get("images", [])
        if index >= len(images) or not Path(images[index]).is_file():
            raise HTTPException(404, f"job {number} has no picture {index}")
        return FileResponse(images[index], media_type="image/png")

    @service.get("/bundles", responses=REFUSED)
    def bundles_there(owner: Owner) -> list[ShownBundle]:
        return [ShownBundle(name=e.name, tokens=list(e.tokens), words=list(e.words), base=e.base, learned=e.learned, mib=e.mib)
                for e in list_bundles(bundles) if not e.problem]  # fmt: skip

    @service.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok", "version": __version__}

    return service


def shown(entry: Entry) -> Shown:
    result = entry.result or {}
    images = [f"/jobs/{entry.id}/images/{k}" for k in range(len(result.get("images", [])))] if entry.state == DONE else []
    progress = Progress(**{k: entry.progress[k] for k in ("what", "done", "total")}) if entry.progress else None
    return Shown(id=entry.id, kind=entry.request["kind"], state=entry.state, progress=progress, images=images,  # type: ignore[arg-type]
                 bundle=result.get("bundle"), error=without_folders(entry.error) if entry.error else None)  # fmt: skip


def boxes_text(boxes: list[list[float]] | None) -> str | None:
    """Raises InputError for a box without area."""
    if not boxes:
        return None
    for box in boxes:
        Box(*box)
    text = json_text(boxes)
    parse_boxes_alone(text)
    return text


def keep_upload(state: Path, data: str, what: str) -> Path:
    """A picture that came as base64, as a file of ours. Raises InputError for one that is none."""
    try:
        content = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise InputError(f"{what} is no base64") from None
    path = new_upload(state)
    with write_file(path) as temporary:
        temporary.write_bytes(content)
    try:
        open_image(path)
    except InputError as error:
        path.unlink()
        raise InputError(f"{what} cannot be used: {error}") from None
    return path


def keep_instance_upload(state: Path, asked: ToLearn) -> Path:
    """An instance folder of what came. Raises InputError, as `load_instance` does."""
    from ..data.instance import load_instance

    if len(asked.masks) > MAX_ASSETS or (asked.words and len(asked.words) != len(asked.masks)):
        raise InputError(f"{len(asked.masks)} masks and {len(asked.words)} words were given; expected a word for each, or none")
    folder = new_photo(state)
    try:
        for name, data in (("img.png", asked.image), *((f"mask{k}.png", mask) for k, mask in enumerate(asked.masks))):
            keep_upload(state, data, name).rename(folder / name)
        if asked.words:
            (folder / "words.txt").write_text("".join(f"{' '.join(word.split())}\n" for word in asked.words), encoding="utf-8")
        load_instance(folder)
    except InputError as error:
        shutil.rmtree(folder)
        raise InputError(f"the photo and its masks cannot be used: {error}") from None
    return folder
