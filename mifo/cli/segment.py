"""The command that makes an instance folder of a photo: boxes, clicks or proposals in, masks out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from ..io.console import Job, say, waiting
from ..io.files import check_writable
from ..io.outputs import PLACE, check_apart, check_output, numbered_folder
from ..io.terminal import command_line
from .app import app
from .job import job_command
from .options import Device, Overwrite, path, path_argument


@job_command(app, 'mifo segment desk.jpg --box 0.1,0.2,0.4,0.8 --box 0.5,0.3,0.9,0.8 --words "red car" --words mug \\\n'
                  '    --output-path my_photos/desk')  # fmt: skip
def segment(
    job: Job,
    photo: Annotated[Path, path_argument("The photo.")],
    box: Annotated[
        list[str] | None,
        typer.Option(metavar="x0,y0,x1,y1", help="Around one thing, from 0 to 1 or in pixels; once for each thing."),
    ] = None,
    point: Annotated[
        list[str] | None,
        typer.Option(metavar="x,y", help="On one thing. In a box it says what of it is meant; else it is a thing alone."),
    ] = None,
    words: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help='What a thing is, such as "red car": for each box, then each point outside them.'),
    ] = None,
    auto: Annotated[bool, typer.Option("--auto", help="Propose at most 8 things that stand out.")] = False,
    choose: Annotated[str | None, typer.Option(help="With --auto: the numbers to keep, such as 0,2,3.")] = None,
    sam2: Annotated[str | None, path("Segment by this SAM 2: a hub id such as facebook/sam2.1-hiera-small, or a folder.")] = None,
    device: Device = "",
    output_path: Annotated[
        Path | None, path("The instance folder to write; output/segment/0001 and so on by default.", metavar="PATH")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Make an instance folder for learn: a mask of each thing in a photo, from boxes or clicks."""
    from ..segmentation.grabcut import GrabCut
    from ..segmentation.hints import parse_box, parse_point
    from ..segmentation.instance_folder import KIND
    from ..segmentation.segment import Segmenter, read_photo, segment_salient
    from ..segmentation.segment import segment as run_segment

    if auto and (box or point):
        raise InputError("--auto proposes things by itself, but a --box or a --point was given too; leave one of them out")
    if choose is not None and not auto:
        raise InputError("--choose picks from what --auto proposes; give --auto too")
    check_writable(output_path or PLACE)
    place = PLACE / "segment"
    check_apart(output_path, place, {"the photo": photo}, {})
    check_output(output_path, place, KIND, overwrite)
    with waiting("reading the photo"):
        stored, image = read_photo(photo)
    for note in stored.notes():
        say(f"note: {note}")
    segmenter: Segmenter = GrabCut()
    if sam2 is not None:
        from ..model.device import choose_device
        from ..segmentation.sam2 import Sam2

        with waiting("loading SAM 2"):
            segmenter = Sam2(sam2, choose_device(device))
    with waiting("finding the things"):
        if auto:
            found = segment_salient(stored, image, _numbers(choose), segmenter)
        else:
            boxes, points = ([parse(text, image.size) for text in given or ()] for parse, given in
                             ((parse_box, box), (parse_point, point)))  # fmt: skip
            found = run_segment(stored, image, boxes, points, segmenter)  # type: ignore[arg-type]
    with numbered_folder(output_path, place) as folder, waiting("writing the masks"):
        paths = found.save(folder, words or (), overwrite)
    shares = [round(float(mask.mean()), 4) for mask in found.masks]
    things = [{"box": [round(v, 4) for v in hint.box.as_tuple()], "share_of_picture": share, "words": words[k] if words else None}
              for k, (hint, share) in enumerate(zip(found.hints, shares, strict=True))]  # fmt: skip
    job.text(*(f"<asset{k}>: {100 * share:.1f} % of the picture" for k, share in enumerate(shares)),
             f"look at {paths['overview']}; then: {command_line('mifo', 'learn', str(folder))}")  # fmt: skip
    job.json({"instance": str(folder), **paths, "things": things, "segmenter": segmenter.name})


def _numbers(text: str | None) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text is not None else []
    except ValueError:
        raise InputError(f"--choose is '{text}'; expected numbers with commas, such as 0,2,3") from None
