"""Memory: what is counted, what is planned, what is given up for it, and that nothing else changes."""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from _tiny import load_base, mifo, tiny_base_folder, write_instance
from safetensors.torch import load_file

from mifo.attention import backend as backends
from mifo.attention.record import record_attention
from mifo.attention.sites import choose_sites
from mifo.config import CompositeConfig, LearnConfig, MemoryConfig, SynthesisConfig
from mifo.data.instance import fit_instance, load_instance
from mifo.editing.blending import tune_to_source
from mifo.errors import InputError
from mifo.learning.composites import Composites
from mifo.learning.dataset import InstanceData
from mifo.learning.learn import gradient_checkpointing, lend_adapters
from mifo.learning.optimizer import Stepper, make_optimizer
from mifo.learning.trainer import Trainer
from mifo.model.base import BaseModel
from mifo.model.embedding import use_assets
from mifo.model.half_precision import follow_input_dtype
from mifo.model.load_base import load_base_model
from mifo.model.lora import add_adapters
from mifo.planning.live_bytes import LiveBytes
from mifo.planning.planner import GIB, RESERVE, Settings, make_plan, phases_of, read_model
from mifo.planning.trace import trace_learning, trace_tuning
from mifo.presets import learn_preset
from mifo.prompts import add_asset_tokens

# --- counting -----------------------------------------------------------------------------------


def test_live_bytes_follow_storages_from_their_making_to_their_end() -> None:
    weight = torch.ones(256, 256, device="meta", requires_grad=True)
    block = 256 * 256 * 4
    with LiveBytes([weight]) as live:
        hidden = weight @ weight
        out = hidden.relu()
        views = [hidden.view(-1), weight.T]
        assert live.live["activations"] == 2 * block, "views are nobody's bytes"
        del hidden, views
        assert live.live["activations"] == block, "relu keeps its result for the backward pass, not its input"
        with live.tagged("maps"):
            kept = torch.empty(1000, device="meta")
        assert live.live["maps"] == 4096, "rounded up to the allocator's blocks"
        live.retag(kept, "masks")
        assert live.live["maps"] == 0 and live.live["masks"] == 4096
        del out, kept
    assert sum(live.live.values()) == 0
    assert live.peak.total == 2 * block


@pytest.mark.parametrize("name, unet, text", [("sd1.5", 859_520_964, 123_060_480), ("sd2.1", 865_910_724, 340_387_840)])
def test_the_known_shapes_have_the_published_numbers_of_weights(name: str, unet: int, text: int) -> None:
    sizes = read_model(name).sizes
    assert (sizes["unet"], sizes["text_encoder"], sizes["vae"]) == (unet, text, 83_653_863)


def config_and_data(base: BaseModel, folder: Path, checkpointing: bool) -> tuple[LearnConfig, InstanceData]:
    config = learn_preset("stable-diffusion")
    terms = replace(config.lora.attention, levels=(1,), max_timestep=1001)
    config = replace(config, lora=replace(config.lora, attention=terms), union_sampling=False,
                     prior=replace(config.prior, enabled=False), gradient_checkpointing=checkpointing)  # fmt: skip
    data = InstanceData(fit_instance(load_instance(write_instance(folder / "pair")), 64), base)
    return config, data


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_plan_of_a_learning_step_is_what_a_real_step_takes(tmp_path: Path, checkpointing: bool) -> None:
    base = load_base()
    config, data = config_and_data(base, tmp_path, checkpointing)
    tokens = ["<asset0>", "<asset1>"]
    add_asset_tokens(base.tokenizer, tokens)
    ids = [base.tokenizer.get_added_vocab()[t] for t in tokens]
    rows = torch.zeros(2, base.text_encoder.config.hidden_size)
    sites = choose_sites(base.unet, config.lora.attention.blocks, config.lora.attention.levels)
    with use_assets(base.text_encoders, ids, rows) as embedding, lend_adapters(base, config.lora, 0), \
            gradient_checkpointing(base, checkpointing):  # fmt: skip
        embedding.vectors.requires_grad_(True)
        trainer = Trainer(base, data, config, embedding)
        gc.collect()
        known = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
        with record_attention(base.unet, sites) as recorder, LiveBytes(known) as live:
            trainer.objective.losses(config.lora, 0, sites, recorder, None).total.backward()
    measured = live.peak.total
    traced = trace_learning(read_model(str(tiny_base_folder())), 64, torch.float32, 1, 2, config.lora.rank, True, True,
                            checkpointing, config.lora.attention, "sdpa")  # fmt: skip
    assert traced.peak.total == pytest.approx(measured, rel=0.1), (traced.peak, live.peak)


@pytest.mark.parametrize("tuned", ["weights", "latents"])
def test_the_plan_of_tuning_a_decoder_is_what_it_takes(tuned: str) -> None:
    vae, inputs = load_base().vae, (torch.zeros(1, 12, 16, 16), torch.zeros(1, 3, 128, 128), torch.ones(1, 1, 128, 128))
    gc.collect()
    with LiveBytes([t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]) as live:
        tune_to_source(vae, *inputs, 3, tuned)
    traced = trace_tuning(read_model(str(tiny_base_folder())), 128, torch.float32, False, tuned)
    assert traced.total == pytest.approx(live.peak.total, rel=0.1), (traced, live.peak)


@pytest.mark.parametrize("piece", ["guidance", "sampling", "decode"])
def test_the_plan_of_drawing_is_what_it_takes(piece: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from scripts.performance import measure_drawing

    base, model = load_base(), read_model(str(tiny_base_folder()))
    gc.collect()
    with LiveBytes([t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]) as live:
        measure_drawing.draw(base, piece, 64, 2)
    planned = measure_drawing.planned(model, 64, torch.float32, 2)[piece] * GIB
    assert planned == pytest.approx(live.peak.total, rel=0.1)


def test_composites_are_planned_for_and_take_what_is_planned(tmp_path: Path) -> None:
    base, model = load_base(), read_model(str(tiny_base_folder()))
    instance = fit_instance(load_instance(write_instance(tmp_path / "pair")), 64)
    config = CompositeConfig(share=1.0, backgrounds="a photo", num_backgrounds=1, sampling_steps=1)
    made = Composites(instance, base, config, seed=0)
    gc.collect()
    with torch.no_grad(), LiveBytes([t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]) as live:
        made.draw(np.random.default_rng(0), union_sampling=True, flip_probability=0.0).encode()
    asked = settings(learn=replace(learn_preset("stable-diffusion"), composites=config), assets=2)
    planned = {phase.name: phase.items for phase in phases_of(model, asked)}
    weights = model.sizes["vae"] * torch.float32.itemsize
    for name in ("phase 1", "phase 2"):
        theirs = planned[f"{name}'s composites"]
        assert theirs["VAE"] - weights == pytest.approx(live.peak.total, rel=0.1)
        assert theirs["optimizer states"] == planned[name]["optimizer states"] > 0
    assert {"backgrounds", "backgrounds' decoding"} <= planned.keys()
    without = phases_of(model, replace(asked, learn=learn_preset("stable-diffusion")))
    assert not [phase.name for phase in without if "composites" in phase.name or "backgrounds" in phase.name]


def test_less_is_planned_with_checkpointing_and_more_without_fused_attention() -> None:
    model, terms = read_model("toybox"), learn_preset("toybox").lora.attention
    common = (model, 128, torch.float32, 2, 2, 4, True, True)
    ways = ((False, terms, "sdpa"), (True, terms, "sdpa"), (False, terms, "materialized"))
    plain, checkpointed_, dense = (trace_learning(*common, *way).peak.total for way in ways)
    assert checkpointed_ < 0.8 * plain < plain < dense


# --- planning -----------------------------------------------------------------------------------


def settings(**changes: Any) -> Settings:
    return replace(Settings("learn", 64, torch.float32, learn_preset("toybox"), SynthesisConfig()), **changes)


def test_only_what_is_needed_is_given_up_and_a_hopeless_budget_is_refused_with_its_sum() -> None:
    model = read_model("toybox")
    free = make_plan(model, settings())
    assert free.fits and free.given_up == () and free.settings == settings()
    enough = make_plan(model, settings(), (free.largest.peak + RESERVE) / GIB)
    assert enough.given_up == ()
    tight = make_plan(model, settings(), (free.largest.peak + RESERVE - 1) / GIB)
    assert tight.fits and tight.given_up and tight.largest.peak < free.largest.peak
    assert phases_of(model, tight.settings) == tight.phases
    assert "UNet in NF4" not in tight.given_up, "the dearest comes last"
    hopeless = make_plan(model, settings(), RESERVE / GIB)
    with pytest.raises(InputError, match=r"does not fit into 0\.50 GiB even with .*NF4.* = .* GiB") as refused:
        hopeless.check()
    assert "--vram-gib" in str(refused.value)
    assert all(p.peak == sum(p.items.values()) for p in free.phases)


def test_the_plan_command() -> None:
    found = json.loads(mifo("plan", "--model-path", "toybox", "--job", "synthesize", "--json").stdout)
    assert found["fits"] and set(found["phases"]) == {"guidance", "sampling", "decode"}
    assert found["peak_gib"] == max(p["peak_gib"] for p in found["phases"].values())
    refused = mifo("plan", "--model-path", "toybox", "--vram-gib", "0.5", exit_code=2)
    assert "does not fit" in refused.output and "Traceback" not in refused.output
    assert "multiple" in mifo("plan", "--model-path", "toybox", "--resolution", "100", exit_code=2).output
    assert "local folder" in mifo("plan", "--model-path", "nobody/nothing", exit_code=2).output


# --- attention backends -------------------------------------------------------------------------


class FakeXformers(ModuleType):
    """xformers' contract in plain matrices: (B, Q, heads, D), a bias that is added, rows of it aligned to 8 numbers."""

    class ops:
        @staticmethod
        def memory_efficient_attention(query: Any, key: Any, value: Any, attn_bias: Any = None, scale: float = 1.0) -> Any:
            if attn_bias is not None:
                assert attn_bias.shape == (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
                assert attn_bias.stride(-2) % 8 == 0 and attn_bias.dtype == query.dtype
            scores = torch.einsum("bqhd,bkhd->bhqk", query * scale, key) + (0 if attn_bias is None else attn_bias)
            return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)


@pytest.mark.parametrize("masked", [False, True])
def test_every_backend_gives_the_same_attention_and_gradients(monkeypatch: pytest.MonkeyPatch, masked: bool) -> None:
    monkeypatch.setitem(sys.modules, "xformers", FakeXformers("xformers"))
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 20, 8), (2, 3, 13, 8), (2, 3, 13, 8))
    visible = torch.rand((2, 1, 20, 13), generator=generator) > 0.4 if masked else None
    parts = [torch.randn(s, generator=generator) for s in shapes]
    found = {}
    for name in ("sdpa", "materialized", "xformers"):
        inputs = [p.clone().requires_grad_() for p in parts]
        out = backends._KERNELS[name](*inputs, visible, 0.3)
        found[name] = (out, *torch.autograd.grad(out.pow(2).sum(), inputs))
    for name in ("materialized", "xformers"):
        for ours, expected in zip(found[name], found["sdpa"], strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_the_whole_unet_is_the_same_on_every_backend_and_itself_afterwards(toybox_random_base: BaseModel) -> None:
    unet = toybox_random_base.unet
    inputs = (torch.randn(1, 12, 16, 16), torch.tensor(10), torch.randn(1, 5, 128))
    before = dict(unet.attn_processors)
    with torch.no_grad():
        expected = unet(*inputs).sample
        for name in ("sdpa", "materialized"):
            with backends.use_backend(unet, backends.choose_backend(name, "cpu", torch.float32)):
                torch.testing.assert_close(unet(*inputs).sample, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(unet(*inputs).sample, expected) and unet.attn_processors == before


def test_kernels_are_timed_with_their_gradient() -> None:
    calls: list[tuple[int, ...]] = []

    def kernel(query, key, value, visible, scale):
        calls.append((*query.shape, int(query.requires_grad)))
        return backends.sdpa(query, key, value, visible, scale)

    assert 0 < backends.kernel_seconds(kernel, "cpu", torch.float32, repeats=2) < 60
    assert calls == [(2, 2, 256, 32, 1)] * 3


def test_the_choice_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)  # as where it is not installed
    assert backends.choose_backend("auto", "cpu", torch.float32) == backends.Backend("sdpa", "xformers is not installed")
    with pytest.raises(InputError, match="not installed; use auto or sdpa"):
        backends.choose_backend("xformers", "cpu", torch.float32)
    monkeypatch.setitem(sys.modules, "xformers", FakeXformers("xformers"))
    assert backends.choose_backend("xformers", "cpu", torch.float32) == backends.Backend("xformers", "asked for")
    for milliseconds, expected in ((8.0, "xformers"), (9.5, "sdpa"), (12.0, "sdpa")):  # beside SDPA's 10; a tenth counts
        taken = {backends.xformers: milliseconds, backends.sdpa: 10.0}
        monkeypatch.setattr(backends, "kernel_seconds", lambda kernel, *_, taken=taken: taken[kernel] / 1000)
        found = backends.choose_backend("auto", "cpu", torch.float32)
        assert found.name == expected and f"xformers {milliseconds:.2f} ms" in found.reason
    wrong = SimpleNamespace(ops=SimpleNamespace(memory_efficient_attention=lambda q, k, v, attn_bias, scale: q + k + v))
    monkeypatch.setitem(sys.modules, "xformers", wrong)
    assert backends.choose_backend("auto", "cpu", torch.float32).name == "sdpa", "a kernel with wrong results is not used"


# --- precision ----------------------------------------------------------------------------------


def test_a_gradient_scaler_steps_adapters_on_an_fp16_base() -> None:
    base = load_base_model(str(tiny_base_folder()), "cpu", torch.float16)
    adapters = add_adapters(base, 4, True)
    first = len(base.tokenizer)
    with use_assets(base.text_encoders, [first], torch.zeros(1, base.text_encoder.config.hidden_size)) as embedding:
        own = [p for a in adapters.values() for p in a.parameters() if p.requires_grad and p is not embedding.vectors]
        weights = [*own, embedding.vectors]
        before = [w.detach().clone() for w in weights]
        optimizer, scaler = torch.optim.AdamW(weights, lr=1e-2), torch.amp.GradScaler("cpu", init_scale=256.0)
        for _ in range(2):  # the first step opens LoRA's zero matrices, the second moves all
            states = base.encode_prompt(torch.tensor([[1, first, 2]])).states
            prediction = base.unet(torch.ones(1, 12, 16, 16, dtype=torch.float16), torch.tensor(10), states).sample
            assert prediction.dtype == torch.float16
            scaler.scale(prediction.float().pow(2).mean()).backward()
            scaler.unscale_(optimizer)  # refuses gradients in fp16
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
    assert all(w.dtype == torch.float32 and torch.isfinite(w).all() for w in weights)
    moved = sum(not torch.equal(w, b) for w, b in zip(weights, before, strict=True))
    assert moved > 0.9 * len(weights), f"{moved} of {len(weights)}"


def test_both_phases_learn_in_fp16_through_the_trainers_own_loop(tmp_path: Path) -> None:
    base = load_base_model(str(tiny_base_folder()), "cpu", torch.float16)
    config, data = config_and_data(base, tmp_path, checkpointing=False)
    config = replace(config, embedding=replace(config.embedding, train_steps=2), lora=replace(config.lora, train_steps=1, rank=2))
    stepper = Stepper(base.device, "fp16", torch.amp.GradScaler("cpu", init_scale=256.0))
    tokens = ["<asset0>", "<asset1>"]
    add_asset_tokens(base.tokenizer, tokens)
    ids = [base.tokenizer.get_added_vocab()[t] for t in tokens]
    with use_assets(base.text_encoders, ids, torch.zeros(2, base.text_encoder.config.hidden_size)) as embedding:
        trainer = Trainer(base, data, config, embedding, stepper=stepper)
        trainer.train_embedding()
        rows = embedding.vectors.detach().clone()
        with lend_adapters(base, config.lora, 0) as adapters:
            trainer.train_lora(adapters)
            opened = [p for a in adapters.values() for n, p in a.named_parameters() if "lora_B" in n]
            assert opened and all(p.dtype == torch.float32 and p.abs().max() > 0 for p in opened)
    assert rows.dtype == torch.float32 and bool(rows.any()) and not torch.equal(embedding.vectors, rows)
    assert trainer.state.skipped_steps == 0, "a skipped step would hide what it could not unscale"


def test_adapters_that_follow_their_input_are_the_same_on_an_fp32_base() -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 5)), config)
    names = list(model.state_dict())
    inputs = torch.randn(3, 6)
    expected = model(inputs)
    follow_input_dtype(model)
    assert torch.equal(model(inputs), expected) and list(model.state_dict()) == names


def test_nf4_weights_are_near_the_real_ones_and_adapters_learn_on_them() -> None:
    pytest.importorskip("bitsandbytes")
    inputs = (torch.randn(1, 12, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor(10))
    base = load_base()
    states = base.encode_prompt(torch.tensor([[1, 2, 3]])).states
    expected = base.unet(*inputs, states).sample
    small = load_base_model(str(tiny_base_folder()), "cpu", torch.float32, MemoryConfig(nf4=True))
    found = small.unet(*inputs, states).sample
    error = float((found - expected).norm() / expected.norm())
    assert 0 < error < 0.2
    held = sum(p.numel() * p.element_size() for p in small.unet.parameters())
    assert held < 0.8 * sum(p.numel() * p.element_size() for p in base.unet.parameters())
    adapter = add_adapters(small, 2, False)["unet_lora"]
    small.unet(*inputs, states).sample.pow(2).mean().backward()
    assert all(p.grad is not None for n, p in adapter.named_parameters() if "lora_B" in n)


def test_without_8bit_adam_the_reason_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from mifo.learning import optimizer as module

    monkeypatch.setattr(module, "why_no_8bit_adam", lambda devices: "bitsandbytes has no build for this platform")
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = make_optimizer([{"params": [weight]}], learn_preset("toybox"), use_8bit=True)
    assert type(optimizer) is torch.optim.AdamW
    assert "no 8-bit Adam: bitsandbytes has no build" in capsys.readouterr().err


# --- jobs ---------------------------------------------------------------------------------------


def test_learning_within_a_budget_gives_up_what_it_must_and_records_it(tmp_path: Path) -> None:
    instance = write_instance(tmp_path / "two")
    arguments = ["learn", instance, "--model-path", tiny_base_folder(), "--output-dir", tmp_path / "out", "--json",
                 "--phase1-train-steps", 1, "--phase2-train-steps", 1, "--num-class-images", 1, "--lora-rank", 2]  # fmt: skip
    model = read_model(str(tiny_base_folder()))
    config = learn_preset("stable-diffusion")
    config = replace(config, lora=replace(config.lora, rank=2), prior=replace(config.prior, num_class_images=1))
    free = make_plan(model, settings(resolution=model.native_resolution, learn=config, assets=2))
    budget = (free.largest.peak + RESERVE) / GIB - 0.001
    said = mifo(*arguments, "--vram-gib", budget, "--attention-backend", "materialized")
    bundle = json.loads((Path(json.loads(said.stdout)["bundle"]) / "bundle.json").read_text())
    assert bundle["memory"]["vae_on_cpu"] or bundle["memory"]["max_batch"] == 1 or bundle["config"]["gradient_checkpointing"]
    assert "turned on for" in said.stderr and "attention: materialized" in said.stderr
    refused = mifo(*arguments, "--name", "other", "--vram-gib", 0.5, exit_code=2)
    assert "does not fit" in refused.output and not (tmp_path / "out" / "other").exists()


def test_random_stable_diffusion_loads_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scripts.make_random_sd import write_random_sd

    write_random_sd("sd1.5", tmp_path / "sd", width_divisor=8)
    names = load_file(tmp_path / "sd" / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in names)  # as on the hub, for every version of transformers
    base = load_base_model(str(tmp_path / "sd"))
    assert base.scheduler.config["prediction_type"] == "epsilon" and base.resolution == 512
    assert base.text_encoder.get_input_embeddings().num_embeddings == len(base.tokenizer) == 49408
    ids = base.tokenizer("a photo of a red car", padding="max_length").input_ids
    with torch.no_grad():
        out = base.unet(torch.randn(1, 4, 16, 16), torch.tensor(5), base.encode_prompt(torch.tensor([ids])).states).sample
    assert len(ids) == 77 and out.shape == (1, 4, 16, 16) and torch.isfinite(out).all()
