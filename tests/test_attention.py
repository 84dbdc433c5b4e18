"""The modules against the specification in fp64, and everything a module has to go through."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dwattn
from dwattn import reference
from dwattn.errors import DwattnError, GeometryError
from dwattn.geometry import Geometry
from dwattn.projections import AttentionWeights
from dwattn.variants import REPLACEMENTS, VARIANTS, build_replacement
from support.layers import expected_patches, expected_prefix

DIM, HEADS, GRID = 24, 3, (3, 4)
VARIANT_OPTIONS: dict[str, dict[str, Any]] = {name: {} for name in REPLACEMENTS} | {
    "lowrank_dw": {"rank": 16}
}


def make(variant: str, num_prefix: int = 0, **options: Any) -> nn.Module:
    """A module in fp64 with random values everywhere, also where it would start from zeros."""
    torch.manual_seed(1)
    kwargs = {"grid": GRID, "num_prefix": num_prefix, **VARIANT_OPTIONS[variant], **options}
    module = REPLACEMENTS[variant](DIM, HEADS, **kwargs).double()
    fill(module)
    return module


def fill(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def tokens(num_prefix: int, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    count = num_prefix + GRID[0] * GRID[1]
    return torch.randn(batch, count, DIM, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("num_prefix", [0, 1, 5])
@pytest.mark.parametrize("variant", REPLACEMENTS)
def test_equals_reference(variant: str, num_prefix: int) -> None:
    geometry = Geometry(*GRID, num_prefix)
    module, x = make(variant, num_prefix), tokens(num_prefix)
    out = module(x)
    assert out.shape == x.shape
    expected = expected_patches(module, x, geometry)
    if num_prefix:
        expected = torch.cat([expected_prefix(module, x, geometry), expected], dim=1)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", ["dw", "conv"])
@pytest.mark.parametrize(
    "options", [{"prefix": "static"}, {"context": False}, {"qkv_bias": False, "proj_bias": False}]
)
def test_options_equal_reference(variant: str, options: dict[str, Any]) -> None:
    geometry = Geometry(*GRID, 5)
    module, x = make(variant, 5, **options), tokens(5)
    parts = [expected_prefix(module, x, geometry), expected_patches(module, x, geometry)]
    torch.testing.assert_close(module(x), torch.cat(parts, dim=1), rtol=0, atol=1e-12)


def test_exact_prefix_rows_are_softmax_attention() -> None:
    """The absorbed form against full attention, key bias included: it must cancel."""
    torch.manual_seed(0)
    shapes = {"wq": (DIM, DIM), "wk": (DIM, DIM), "wv": (DIM, DIM), "wo": (DIM, DIM)}
    shapes |= {"bq": (DIM,), "bk": (DIM,), "bv": (DIM,), "bo": (DIM,)}
    w = {name: torch.randn(shape, dtype=torch.float64) * 0.3 for name, shape in shapes.items()}
    weights = AttentionWeights(HEADS, DIM // HEADS, (DIM // HEADS) ** -0.5, **w)
    x = tokens(5)
    for variant, options in VARIANT_OPTIONS.items():
        layer = build_replacement(variant, weights, num_prefix=5, grid=GRID, **options)
        full = reference.mhsa(x, num_heads=HEADS, **w)
        torch.testing.assert_close(layer(x)[:, :5], full[:, :5], rtol=0, atol=1e-10)
        assert not torch.allclose(layer(x)[:, 5:], full[:, 5:], atol=1e-2), variant


@pytest.mark.parametrize("num_prefix", [0, 1, 5])
@pytest.mark.parametrize("heads", [[0], [1, 2], [2, 0]])
def test_scattered_equals_reference(num_prefix: int, heads: list[int]) -> None:
    torch.manual_seed(0)
    names = ("wq", "wk", "wv", "wo")
    w = {name: 0.3 * torch.randn(DIM, DIM, dtype=torch.float64) for name in names}
    w |= {name: 0.3 * torch.randn(DIM, dtype=torch.float64) for name in ("bq", "bk", "bv", "bo")}
    scale = (DIM // HEADS) ** -0.5
    weights = AttentionWeights(HEADS, DIM // HEADS, scale, **w)
    layer = build_replacement("dw", weights, num_prefix=num_prefix, heads=heads, grid=GRID)
    for name in ("kernel", "kappa", "mu", "beta"):
        if getattr(layer, name) is not None:
            torch.nn.init.normal_(getattr(layer, name))
    x = tokens(num_prefix)
    expected = reference.scattered_attention(
        x, w["wq"], w["wk"], w["wv"], w["wo"], HEADS, tuple(sorted(heads)), layer.kernel,
        Geometry(*GRID, num_prefix), bq=w["bq"], bk=w["bk"], bv=w["bv"], bo=w["bo"],
        kappa=layer.kappa, mu=layer.mu, beta=layer.beta,
    )  # fmt: skip
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


def test_self_attention_equals_reference() -> None:
    module = dwattn.SelfAttention(DIM, HEADS).double()
    fill(module)
    x, m = tokens(1), module
    expected = reference.mhsa(
        x, m.query.weight, m.key.weight, m.value.weight, m.proj.weight, HEADS,
        bq=m.query.bias, bk=m.key.bias, bv=m.value.bias, bo=m.proj.bias,
    )  # fmt: skip
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-12)


def test_grid_orientation_matters() -> None:
    """3x4 and 4x3 grids have as many tokens; they must not give the same result."""
    module, x = make("dw"), tokens(0)
    assert not torch.allclose(module(x, grid=(4, 3)), module(x, grid=(3, 4)))
    torch.testing.assert_close(module(x, grid=(3, 4)), module(x))


def test_shift_invariance_of_the_interior() -> None:
    """A convolution's output follows its input; that tells taps from each other, and rows from
    columns.
    """
    module, x = make("dw", context=False), torch.zeros(1, 12, DIM, dtype=torch.float64)
    with torch.no_grad():
        module.value.bias.zero_()
        module.proj.bias.zero_()
    source = torch.randn(DIM, dtype=torch.float64)
    x[0, 1 * 4 + 1] = source  # row 1, column 1
    out = module(x).unflatten(1, GRID)
    v = F.linear(source, module.value.weight)
    for row, column in itertools.product(range(3), range(4)):
        dr, dc = 1 - row, 1 - column  # where the source lies, seen from (row, column)
        tap = abs(dr) <= 1 and abs(dc) <= 1
        y = module.kernel[:, dr + 1, dc + 1] * v if tap else torch.zeros_like(v)
        torch.testing.assert_close(out[0, row, column], F.linear(y, module.proj.weight))


@pytest.mark.parametrize("num_prefix", [0, 5])
@pytest.mark.parametrize("variant", REPLACEMENTS)
def test_state_dict_reloads_into_a_fresh_module(variant: str, num_prefix: int) -> None:
    module = make(variant, num_prefix)
    kwargs = {"grid": GRID, "num_prefix": num_prefix, **VARIANT_OPTIONS[variant]}
    fresh = REPLACEMENTS[variant](DIM, HEADS, **kwargs).double()
    x = tokens(num_prefix)
    assert not torch.equal(fresh(x), module(x))
    fresh.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(fresh(x), module(x))


@pytest.mark.parametrize("variant", REPLACEMENTS)
def test_config_rebuilds_the_module(variant: str) -> None:
    module = make(variant, 5, context=False)
    rebuilt = REPLACEMENTS[variant](DIM, HEADS, num_prefix=5, **module.config())
    rebuilt.double().load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(rebuilt(tokens(5)), module(tokens(5)))


@pytest.mark.parametrize("num_prefix", [0, 5])
@pytest.mark.parametrize("variant", REPLACEMENTS)
def test_every_parameter_gets_its_gradient(variant: str, num_prefix: int) -> None:
    """Against central differences along one random direction of all parameters and the input."""
    module = make(variant, num_prefix)
    x = tokens(num_prefix).requires_grad_()
    target = torch.randn_like(module(x))
    (module(x) * target).sum().backward()
    tensors = [x, *module.parameters()]
    assert all(t.grad is not None for t in tensors), [
        n for n, p in module.named_parameters() if p.grad is None
    ]
    directions = [torch.randn_like(t) for t in tensors]
    slope = sum((t.grad * d).sum() for t, d in zip(tensors, directions, strict=True))
    step, values = 1e-5, []
    with torch.no_grad():
        for sign in (1, -2):
            for t, d in zip(tensors, directions, strict=True):
                t += sign * step * d
            values.append((module(x) * target).sum())
    torch.testing.assert_close((values[0] - values[1]) / (2 * step), slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", REPLACEMENTS)
def test_autocast_runs_in_bf16_and_stays_close(variant: str) -> None:
    module = make(variant, 1).float()
    x = tokens(1, dtype=torch.float32)
    exact = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = module(x)
        mixed.float().square().mean().backward()
    assert mixed.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())
    assert (mixed.float() - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", REPLACEMENTS)
def test_low_precision_stays_close(variant: str, dtype: torch.dtype) -> None:
    module, x = make(variant, 1), tokens(1)
    exact = module(x)
    low = module.to(dtype)(x.to(dtype))
    assert low.dtype == dtype
    assert (low.double() - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize(("variant", "num_prefix"), [("dw", 0), *((v, 5) for v in REPLACEMENTS)])
def test_compiles_without_graph_breaks(variant: str, num_prefix: int) -> None:
    torch._dynamo.reset()
    module, x = make(variant, num_prefix), tokens(num_prefix)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x), rtol=0, atol=1e-10)
    compiled(x).sum().backward()
    assert module.value.weight.grad is not None


@pytest.mark.parametrize(("variant", "num_prefix"), [("dw", 0), *((v, 5) for v in REPLACEMENTS)])
def test_exports_with_a_dynamic_batch(variant: str, num_prefix: int) -> None:
    module, x = make(variant, num_prefix).eval(), tokens(num_prefix, batch=2)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(module, (x,), dynamic_shapes={"x": {0: batch}})
    more = tokens(num_prefix, batch=7)
    torch.testing.assert_close(program.module()(more), module(more), rtol=0, atol=1e-10)


@pytest.mark.parametrize("variant", REPLACEMENTS)
def test_sliced_and_transposed_inputs(variant: str) -> None:
    module, x = make(variant, 1), tokens(1)
    wide = torch.randn(2, x.shape[1], 2 * DIM, dtype=torch.float64)
    wide[..., ::2] = x
    torch.testing.assert_close(module(wide[..., ::2]), module(x), rtol=0, atol=1e-12)
    channels_first = x.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(module(channels_first), module(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (5, 1), (2, 2)])
def test_grids_smaller_than_the_kernel(grid: tuple[int, int]) -> None:
    module = make("dw", 1)
    x = torch.randn(1, 1 + grid[0] * grid[1], DIM, dtype=torch.float64)
    expected = expected_patches(module, x, Geometry(*grid, 1))
    torch.testing.assert_close(module(x, grid=grid)[:, 1:], expected, rtol=0, atol=1e-12)


def test_ensemble_folds_into_a_narrow_layer() -> None:
    for num_prefix in (0, 5):
        module, x = make("ens_dw", num_prefix), tokens(num_prefix)
        folded = module.fold()
        assert folded.inner_dim == DIM // HEADS
        torch.testing.assert_close(folded(x), module(x), rtol=0, atol=1e-12)


def test_full_rank_factors_keep_the_action_on_a_uniform_map() -> None:
    torch.manual_seed(0)
    w = {name: torch.randn(DIM, DIM, dtype=torch.float64) for name in ("wq", "wk", "wv", "wo")}
    weights = AttentionWeights(HEADS, DIM // HEADS, 0.3, **w)
    layer = build_replacement("lowrank_dw", weights, num_prefix=0, grid=GRID, rank=DIM)
    torch.testing.assert_close(layer.proj.weight @ layer.value.weight, w["wo"] @ w["wv"])


def test_every_variant_of_the_operator_has_a_module() -> None:
    assert set(VARIANTS) == {"mhsa", "dw", "lowrank_dw", "conv", "ens_dw", "spvit"}


@pytest.mark.parametrize("variant", REPLACEMENTS)
def test_wrong_token_counts_are_refused_with_all_numbers(variant: str) -> None:
    module = make(variant, 1)
    for count in (12, 14):
        with pytest.raises(
            GeometryError, match=rf"N={count} tokens.*num_prefix=1.*height=3 x width=4"
        ):
            module(torch.zeros(1, count, DIM, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix": "bogus"}, "'bogus'.*exact, static, drop"),
        ({"prefix": "drop", "num_prefix": 1}, "num_prefix=1.*class_token=False"),
        ({"num_prefix": -1}, "num_prefix=-1"),
        ({"grid": (0, 4)}, "height=0"),
        ({"grid": (3, -4)}, "width=-4"),
        ({"grid": 5}, r"grid=5 must be two whole numbers, \(height, width\)"),
        ({"grid": (3.0, 4.0)}, r"grid=\(3.0, 4.0\) must be two whole numbers"),
        ({"grid": (2, 3, 4)}, r"grid=\(2, 3, 4\) must be two whole numbers"),
        ({"head_dim": 0}, "num_heads=3 and head_dim=0 must be 1 or more"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DwattnError, match=message):
        dwattn.FusedDWAttention(DIM, HEADS, **{"grid": GRID, **options})


def test_widths_that_do_not_divide_are_refused() -> None:
    with pytest.raises(DwattnError, match=r"dim=25 is not a multiple of num_heads=3"):
        dwattn.FusedDWAttention(25, 3, grid=GRID)
    module = dwattn.FusedDWAttention(25, 3, head_dim=8, grid=GRID)
    assert module(torch.zeros(1, 12, 25)).shape == (1, 12, 25)
    for rank in (0, 2.5):
        with pytest.raises(DwattnError, match=f"rank={rank}"):
            dwattn.LowRankDWAttention(DIM, HEADS, rank=rank, grid=GRID)
    for variant, cls in (*REPLACEMENTS.items(), ("mhsa", dwattn.SelfAttention)):
        with pytest.raises(DwattnError, match="num_heads=0"):
            cls(DIM, 0, **VARIANT_OPTIONS.get(variant, {}))
    with pytest.raises(GeometryError, match=r"\(batch, N, 24\), got \(12, 24\)"):
        make("dw")(torch.zeros(12, DIM, dtype=torch.float64))


def test_a_layer_that_knows_no_grid_says_so() -> None:
    module = dwattn.FusedDWAttention(DIM, HEADS)
    with pytest.raises(GeometryError, match=r"no fixed grid.*layer\(x, grid=\(height, width\)\)"):
        module(torch.zeros(1, 12, DIM))
    x = torch.zeros(1, 12, DIM)
    assert module(x, grid=(3, 4)).shape == (1, 12, DIM)
    assert module(x, grid=torch.tensor([3, 4])).shape == (1, 12, DIM)
    for grid in (12, (3.0, 4.0), ()):
        with pytest.raises(GeometryError, match=f"grid={re.escape(str(grid))} must be two whole"):
            module(x, grid=grid)


@pytest.mark.parametrize("heads", [[], [0, 0], [3], [-1], [0, 1, 2]])
def test_scattered_heads_must_be_some_distinct_heads(heads: list[int]) -> None:
    with pytest.raises(DwattnError, match="heads"):
        dwattn.ScatteredDWAttention(DIM, HEADS, heads=heads, grid=GRID)


def test_shapes_on_the_meta_device() -> None:
    module = dwattn.FusedDWAttention(DIM, HEADS, grid=GRID, num_prefix=1, device="meta")
    out = module(torch.empty(2, 13, DIM, device="meta"))
    assert out.is_meta
    assert out.shape == (2, 13, DIM)
