"""The models that look at photographs: which ones, at which commit, and loaded without running any code of theirs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..io.read_files import check_regular

DINO = "facebook/dinov2-base"
CLIP = "openai/clip-vit-base-patch32"
DETECTOR = "google/owlv2-base-patch16-ensemble"
#: Hub id -> commit. CLIP's own branch has a pickle alone; the commit is that of the hub's conversion to safetensors.
REVISIONS = {
    DINO: "f9e44c814b77203eaa57a6bdbbd535f21ede1415",
    CLIP: "c237dc49a33fc61debc9276459120b7eac67e7ef",
    DETECTOR: "cfd3195ba4ea9592eec887ded089f4c08eff231d",
}
#: All that is fetched and read: no pickles, no code.
READ = ("*.json", "*.txt", "*.safetensors")
MAX_FILE_BYTES = 1 << 34


def fetch(name: str) -> tuple[Path, str | None]:
    """-> (local folder, commit): of a hub id what is pinned here, else the newest commit; of a local folder itself and None.

    A name that is pinned is never a folder that happens to have it. Raises what the hub or the system raises.
    """
    if name not in REVISIONS and os.path.isdir(name):
        return Path(name), None
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(name, revision=REVISIONS.get(name, "main"), allow_patterns=list(READ)))
    return folder, folder.name


def load(kind: str, name: str, model_class: Any, inputs_class: Any, device: str) -> tuple[Any, Any, str | None]:
    """-> (the frozen model, what makes its inputs, the commit). `kind` is the option that names the model; without an
    `inputs_class` there is nothing that makes inputs.

    Only configurations and safetensors are read: an `auto_map` that names Python files is not followed, whatever anybody answers.
    Raises InputError when the model cannot be had.
    """
    safely = {"trust_remote_code": False, "local_files_only": True}
    try:
        folder, revision = fetch(name)
        for path in sorted(p for pattern in READ for p in folder.glob(pattern)):
            check_regular(path, MAX_FILE_BYTES)
        model = model_class.from_pretrained(folder, use_safetensors=True, **safely)
        inputs = inputs_class and inputs_class.from_pretrained(folder, **safely)
    except MemoryError:
        raise
    except Exception as error:  # transformers and the hub raise many kinds
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise InputError(
            f"the {kind} model '{name}' cannot be loaded ({reason}); check the name and the connection, or give a local folder "
            f"with --{kind}"
        ) from None
    return model.to(device).eval().requires_grad_(False), inputs, revision
