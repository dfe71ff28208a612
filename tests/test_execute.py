"""The executor's numbers: against float64, against steps one by one, at the edges of dtypes, and when it is stopped."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from merge import execute as execute_module
from merge.alphas import Alphas, plan_from_alphas
from merge.blueprint import make_blueprint
from merge.checkpoint import read_checkpoint
from merge.errors import CheckpointError, PlanError
from merge.execute import execute
from merge.plan import Plan, Row, chain
from merge.runtime import Runtime
from merge.verify import _decode, _encode, _ulp

CPU = Runtime("cpu", 2, "test")
GROUPS = {
    "self_attn.q_proj.weight": (8, 12), "self_attn.k_proj.weight": (4, 12), "self_attn.v_proj.weight": (4, 12),
    "self_attn.o_proj.weight": (12, 8), "mlp.gate_proj.weight": (40, 12), "mlp.up_proj.weight": (40, 12),
    "mlp.down_proj.weight": (12, 40), "input_layernorm.weight": (12,), "post_attention_layernorm.weight": (12,),
}  # fmt: skip


def checkpoint(folder, layers=4, dtype=torch.bfloat16, scale=0.05, seed=0, model_type="llama"):
    """A checkpoint saved by the safetensors library itself, so that reader and writer are not the same code."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"model.layers.{layer}.{name}": torch.randn(shape, generator=generator) * scale + ("norm" in name)
        for layer in range(layers)
        for name, shape in GROUPS.items()
    }
    tensors |= {"model.embed_tokens.weight": torch.randn(16, 12, generator=generator), "model.norm.weight": torch.ones(12)}
    tensors["lm_head.weight"] = torch.randn(16, 12, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.to(dtype) for name, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(f'{{"model_type": "{model_type}", "num_hidden_layers": {layers}}}')
    return folder


def run(plan, folder, tmp_path, **options):
    """Executes a plan; the result as the safetensors library reads it."""
    out = tmp_path / "out"
    out.mkdir()
    execute(make_blueprint(plan, read_checkpoint(folder), **options), out, CPU)
    (path,) = out.glob("*.safetensors")
    return load_file(path)


def rounded_share(result, exact, dtype):
    """Share of the elements that are the float64 value rounded once to `dtype` (through float64 itself, no double rounding)."""
    return (result == exact.to(dtype)).double().mean().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(3))
def test_one_rounding(dtype, seed, tmp_path):
    """At least 99.9 % of the elements are the float64 closed form correctly rounded; the rest are near-ties."""
    folder = checkpoint(tmp_path / "in", layers=14, dtype=dtype, seed=seed)
    alphas = torch.rand(13, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    plan = plan_from_alphas(Alphas(chain(alphas, 14), "x"), 14)
    source, result = load_file(folder / "model.safetensors"), run(plan, folder, tmp_path)
    mix = plan.rows[0].mix
    got, exact = [], []
    for name in GROUPS:
        if "norm" not in name:
            got.append(result[f"model.layers.0.{name}"].flatten())
            exact.append(sum(c * source[f"model.layers.{j}.{name}"].double() for j, c in mix.items()).flatten())
    got, exact = torch.cat(got), torch.cat(exact)
    if dtype in (torch.bfloat16, torch.float16):
        assert rounded_share(got, exact, dtype) >= 0.999
    else:  # the sum itself is in this dtype: a few units in the last place
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=float(torch.finfo(dtype).eps) * 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sequential_is_what_steps_do(dtype, tmp_path):
    """--compat sequential: every step in float32, rounded to the storage dtype, bit for bit."""
    folder = checkpoint(tmp_path / "in", layers=6, dtype=dtype)
    steps = chain([0.62, 0.41, 0.77], 6)
    plan = plan_from_alphas(Alphas(steps, "x"), 6, arithmetic="sequential")
    values = load_file(folder / "model.safetensors")
    result = run(plan, folder, tmp_path)
    for step in steps:
        for name in GROUPS:
            into, remove = (values[f"model.layers.{layer}.{name}"] for layer in (step.into, step.remove))
            if "norm" not in name:
                summed = step.alpha * into.float() + (1 - step.alpha) * remove.float()
                values[f"model.layers.{step.into}.{name}"] = summed.to(dtype)
    for layer in range(3):
        for name in GROUPS:
            torch.testing.assert_close(
                result[f"model.layers.{layer}.{name}"], values[f"model.layers.{layer}.{name}"], rtol=0, atol=0
            )


def test_sequential_differs_from_one_rounding(tmp_path):
    """Otherwise the option would do nothing."""
    folder = checkpoint(tmp_path / "in", layers=8)
    results = []
    for arithmetic in ("float32", "sequential"):
        (tmp_path / arithmetic).mkdir()
        plan = plan_from_alphas(Alphas(chain([0.5] * 7, 8), "x"), 8, arithmetic=arithmetic)
        results.append(run(plan, folder, tmp_path / arithmetic)["model.layers.0.mlp.up_proj.weight"])
    assert 0.1 < (results[0] != results[1]).double().mean() < 0.9


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
@pytest.mark.parametrize("tensors", ["projections", "fold-norms"])
def test_blocks_do_not_matter(block, tensors, tmp_path, monkeypatch):
    """Whatever the block and job sizes, the bytes are the same."""
    folder = checkpoint(tmp_path / "in")
    plan = Plan((Row(1, {0: 0.3, 1: 0.5, 3: 0.2}),), 4, tensors=tensors)
    (tmp_path / "a").mkdir()
    expected = run(plan, folder, tmp_path / "a")
    monkeypatch.setattr(execute_module, "MIX_BLOCK", block)
    monkeypatch.setattr(execute_module, "MIX_JOB", 3 * block)
    monkeypatch.setattr(execute_module, "COPY_CHUNK", 100)
    monkeypatch.setattr(execute_module, "COPY_JOB", 250)
    (tmp_path / "b").mkdir()
    for name, value in run(plan, folder, tmp_path / "b").items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


def test_copying_without_the_kernel(tmp_path, monkeypatch):
    """Where copy_file_range cannot serve (another file system, an old kernel), plain reads and writes do."""
    folder = checkpoint(tmp_path / "in")
    plan = Plan(tuple(Row(j, {j: 1.0}) for j in (0, 2)), 4)
    (tmp_path / "a").mkdir()
    expected = run(plan, folder, tmp_path / "a")

    def refuses(*arguments):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(execute_module, "_kernel_copy", refuses)
    (tmp_path / "b").mkdir()
    for name, value in run(plan, folder, tmp_path / "b").items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


def test_float16_overflow_is_an_error(tmp_path):
    folder = checkpoint(tmp_path / "in", dtype=torch.bfloat16, scale=1e5)
    with pytest.raises(CheckpointError, match=r"beyond the range of float16; write another --dtype"):
        run(Plan((Row(0, {0: 1.0}),), 4), folder, tmp_path, dtype="float16")


def test_huge_but_finite_values_pass(tmp_path):
    """The quick check adds a block up; a sum that overflows is no reason to refuse finite numbers."""
    folder = checkpoint(tmp_path / "in", scale=5e37)
    run(Plan((Row(0, {0: 0.5, 1: 0.5}),), 4), folder, tmp_path)


def test_sum_beyond_float32(tmp_path):
    folder = checkpoint(tmp_path / "in", scale=5e37)
    with pytest.raises(CheckpointError, match="beyond the range of float32; check the coefficients"):
        run(Plan((Row(0, {0: 1e6, 1: 1.0}),), 4), folder, tmp_path)


def test_fold_norms_refuses_zeros(tmp_path):
    folder = checkpoint(tmp_path / "in")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][3] = 0
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.0\.input_layernorm\.weight holds zeros"):
        run(Plan((Row(0, {0: 0.5, 1: 0.5}),), 4, tensors="fold-norms"), folder, tmp_path)


def test_fold_norms_needs_a_known_family(tmp_path):
    folder = checkpoint(tmp_path / "in", model_type="bloomier")
    with pytest.raises(PlanError, match="needs to know how 'bloomier' applies its norms"):
        run(Plan((Row(0, {0: 0.5, 1: 0.5}),), 4, tensors="fold-norms"), folder, tmp_path)


def test_source_changed_while_reading(tmp_path):
    """A file that shrinks after its header was read is an error, not a hang or zeros."""
    folder = checkpoint(tmp_path / "in")
    blueprint = make_blueprint(Plan((Row(0, {0: 0.5, 1: 0.5}),), 4), read_checkpoint(folder))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:3000])
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="ended early"):
        execute(blueprint, tmp_path / "out", CPU)


def test_failure_ends_all_threads(tmp_path):
    folder = checkpoint(tmp_path / "in")
    blueprint = make_blueprint(Plan((Row(0, {0: 0.5, 1: 0.5}),), 4), read_checkpoint(folder))
    (tmp_path / "out").mkdir()

    before = threading.active_count()

    def fails():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        execute(blueprint, tmp_path / "out", CPU, meanwhile=fails)
    assert threading.active_count() == before


def test_threads_of_torch_are_given_back(tmp_path):
    before = torch.get_num_threads()
    run(Plan((Row(0, {0: 0.5, 1: 0.5}),), 4), checkpoint(tmp_path / "in"), tmp_path)
    assert torch.get_num_threads() == before


def test_no_file_stays_open(tmp_path):
    folder = checkpoint(tmp_path / "in")
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("no /proc here")
    counts = []
    for index in range(3):
        (tmp_path / str(index)).mkdir()
        run(Plan((Row(0, {0: 0.5, 1: 0.5}),), 4), folder, tmp_path / str(index))
        counts.append(len(list(descriptors.iterdir())))
    assert counts[0] == counts[-1]


# ---------------------------------------------------------------------------------------------------------------------
# The verifier's bit patterns against torch's


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1))
def test_bf16_rounding_is_torchs(values):
    floats = np.array(values, dtype=np.float32)
    expected = torch.from_numpy(floats.copy()).to(torch.bfloat16)
    bits = _encode(floats, "BF16")
    assert torch.equal(torch.from_numpy(bits.view(np.int16).copy()).view(torch.bfloat16), expected)
    np.testing.assert_array_equal(_decode(bits, "BF16"), expected.float().numpy())


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16), ("F32", torch.float32)])
def test_ulp_is_the_distance_to_the_next_number(dtype, torch_dtype):
    values = torch.tensor([1.0, 1.5, 1.99, 2.0, 3.14, 1e-3, 6e-5, 1e4, 0.0], dtype=torch_dtype)
    bits = torch.int32 if torch_dtype == torch.float32 else torch.int16
    upwards = (values.view(bits) + 1).view(torch_dtype)  # the next number has the next bit pattern
    gap = (upwards.double() - values.double()).numpy()
    np.testing.assert_array_equal(_ulp(values.double().numpy(), dtype), gap)
