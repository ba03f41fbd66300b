"""Random models that tests share: the toybox's own shape, and Stable Diffusion's shape in miniature. No weights are read.

Heavy imports stand inside the fixtures, so that tests of plain geometry and text start at once.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from mifo.model.base import BaseModel


os.environ.setdefault("OMP_NUM_THREADS", "1")  # as in the processes that tests start: bytes are compared between the two

#: Modules that run whole commands, train, or start processes: minutes together. `make check` leaves them out.
SLOW_MODULES = {
    "test_api", "test_bad_input", "test_batch", "test_bases_that_people_have", "test_browser", "test_bundle",
    "test_cli", "test_cluster", "test_compiled", "test_edit_commands",
    "test_edit_photos", "test_evaluate", "test_fingerprint", "test_finite", "test_gpu_paths", "test_hostile_files", "test_import",
    "test_library", "test_main_job", "test_memory", "test_notebook", "test_pages", "test_pipeline", "test_privacy",
    "test_processes", "test_relearn", "test_samplers", "test_several", "test_tracking",
    "test_sdxl", "test_service", "test_strangers_files", "test_terminal", "test_toybench", "test_worker",
}  # fmt: skip


#: Modules whose tests take a minute and more, begun first and in this order: two processes would else wait for one of them at
#: the end. The browser's needs what the main job's has learned.
LONGEST_MODULES = ("test_main_job", "test_cluster", "test_browser", "test_notebook", "test_torture", "test_determinism")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` run where CUDA is; those of slow modules are marked `slow`."""
    first = {name: place for place, name in enumerate(LONGEST_MODULES)}
    items.sort(key=lambda item: first.get(item.path.stem, len(first)))
    for item in items:
        if item.path.parent.name == "faults" or item.path.stem in SLOW_MODULES:
            item.add_marker(pytest.mark.slow)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="no CUDA here"))


def _sharpen(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Makes a random UNet's attention maps uneven; they would all be flat otherwise, and steer nothing."""
    for name, weight in unet.named_parameters():
        if ".to_q." in name or ".to_k." in name:
            weight.data.mul_(3)
    return unet


@pytest.fixture(scope="session")
def toybox_random_base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """Random weights in the toybox's shape; v-prediction. A test that borrows it gives it back as it was."""
    import torch
    from diffusers import DDIMScheduler

    from mifo.model.base import BaseModel
    from mifo.toybox.architecture import build_text_encoder, build_tokenizer, build_unet, build_vae, scheduler_config

    torch.manual_seed(0)
    tokenizer = build_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    text_encoder, vae, unet = build_text_encoder(tokenizer), build_vae(), _sharpen(build_unet())
    for part in (text_encoder, vae, unet):
        part.requires_grad_(False).eval()
    scheduler = DDIMScheduler.from_config(scheduler_config())
    return BaseModel("toybox", "toybox", None, "random", tokenizer, text_encoder, vae, unet, scheduler)


@pytest.fixture(scope="session")
def tiny_sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole Stable Diffusion 1.x folder of tiny random weights: 256 px, 32x32 latents, predicts noise."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from mifo.toybox.architecture import build_tokenizer

    torch.manual_seed(1)
    tokenizer = build_tokenizer(tmp_path_factory.mktemp("sd_tokenizer"))
    tokenizer.model_max_length = 77
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ))  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, sample_size=256,
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, scaling_factor=0.18215,
    )  # fmt: skip
    unet = _sharpen(UNet2DConditionModel(
        sample_size=32, in_channels=4, out_channels=4, block_out_channels=(32, 64, 64, 64), layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=48, attention_head_dim=(2, 4, 4, 4), norm_num_groups=8,
    ))  # fmt: skip
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1)  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny_sd")
    StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def tiny_sd_base(tiny_sd_folder: Path) -> BaseModel:
    """`tiny_sd_folder`, loaded as a user's own model would be. A test that borrows it gives it back as it was."""
    from mifo.model.load_base import load_base_model

    return load_base_model(str(tiny_sd_folder))


@pytest.fixture(scope="session", params=["toybox", "stable-diffusion"])
def any_base(request: pytest.FixtureRequest) -> BaseModel:
    """Both of the above, one after the other: what holds for one holds for the other."""
    return request.getfixturevalue("toybox_random_base" if request.param == "toybox" else "tiny_sd_base")
