"""One sweep through the depth of the model: fit, correct, move both token streams on."""

from __future__ import annotations

import copy
import math
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dwattn import data as image_data
from dwattn.adapters import (
    BackboneLayout,
    BlockSite,
    CallConvention,
    ConvertedAttention,
    adapter_for,
    refusal,
)
from dwattn.amp import autocast
from dwattn.attention import EnsembleDWAttention, LowRankDWAttention, ReplacementAttention
from dwattn.calibration.journal import CalibrationResult, LayerNote
from dwattn.calibration.layer_fit import Samples, choose_rank, fit_layer, true_rows
from dwattn.calibration.options import CalibrationOptions
from dwattn.calibration.ridge import Correction, CorrectionFit
from dwattn.calibration.streams import BlockCall, BlockRunner, embed
from dwattn.calibration.views import PhotoViews
from dwattn.errors import CalibrationError
from dwattn.fidelity import drift
from dwattn.geometry import Geometry
from dwattn.progress import progress_bar
from dwattn.projections import AttentionWeights, is_correctable
from dwattn.rotary import Rotary
from dwattn.scattered import ScatteredDWAttention
from dwattn.untouched import untouched
from dwattn.variants import Replacement

#: If a correction leaves more than this share of the held-out error, the block counts as not worth correcting.
USEFUL = 0.985

#: Images that are read, and on a GPU moved through a block, together; on a CPU as many as have so many tokens, whose
#: activations stay in the cache (of a ViT-S eight images of 257 tokens; measured faster than four and sixteen).
IMAGES_TOGETHER, TOKENS_IN_CACHE = 16, 2056


@torch.no_grad()
def calibrate(
    model: nn.Module,
    layout: BackboneLayout,
    replacements: dict[str, ConvertedAttention],
    data: Any,
    **options: Any,
) -> CalibrationResult:
    """Fill the replacement layers with closed-form weights. The model itself is not changed.

    Args:
        model: the original model; layout: its description.
        replacements: by dotted name of the attention layer; their layers are filled in place.
        data: images as for :func:`dwattn.score`; read once.
        options: fields of :class:`CalibrationOptions`.

    Returns:
        Corrections of other layers (to be installed together with the replacements) and diagnostics.

    Raises:
        CalibrationError: options out of range, a variant without closed form, activations that are not finite.
        DataError: no images, or images that do not fit.
    """
    started = time.perf_counter()
    chosen = CalibrationOptions(**options)
    _refuse_compiled(layout)
    device = next(model.parameters()).device.type
    with untouched(model), torch.autocast(device, enabled=False):
        sweep = _Sweep(model, layout, replacements, data, chosen)
        sweep.run()
    sweep.result.seconds = time.perf_counter() - started
    return sweep.result


def _refuse_compiled(layout: BackboneLayout) -> None:
    """Refuse parts of blocks in ``torch.compile``: a copy of one runs the original's graph, and hooks in it are not called."""
    for site in layout.blocks:
        for name, module in site.module.named_modules(prefix=site.name):
            if "_orig_mod" in module._modules:
                raise CalibrationError(
                    f"{name} is in the wrapper of torch.compile, into which calibration cannot look. Put {name}._orig_mod in "
                    f"its place, and compile it again afterwards, or in place: module.compile()."
                )


class _Sweep:
    """State of one sweep: both token streams, and the layers fitted so far."""

    def __init__(
        self,
        model: nn.Module,
        layout: BackboneLayout,
        replacements: dict[str, ConvertedAttention],
        data: Any,
        options: CalibrationOptions,
    ) -> None:
        self.layout, self.replacements, self.options = layout, replacements, options
        self.result = CalibrationResult()
        self.holders = Counter(id(p) for site in layout.blocks for p in site.module.parameters())
        self.original, self.call, self.num_held_out = self._embed(model, data)
        self.converted = self.original
        #: Whether corrections of blocks that stay still help; a block in which none did ends them until the next
        #: replacement, since what later layers cannot repair only grows.
        self.refits = options.refit == "all"
        self.geometry.check(self.original.shape[1])
        on_cpu = self.original.device.type == "cpu"
        tokens = self.original.shape[1]
        together = max(1, TOKENS_IN_CACHE // tokens) if on_cpu else IMAGES_TOGETHER
        self.step = options.batch_size or together

    def _embed(self, model: nn.Module, data: Any) -> tuple[Tensor, BlockCall, int]:
        """Tokens ``(M, N, D)`` before the first block, held-out images first; how blocks are called; and the number of
        held-out images.
        """
        parts: tuple[list[Tensor], list[Tensor]] = ([], [])
        call: BlockCall | None = None
        every = max(2, round(1 / self.options.held_out))
        views = PhotoViews(self.options.views, self.options.seed)
        parameter = next(model.parameters())
        batches = image_data.iterate(
            data, batch_size=self.options.batch_size or IMAGES_TOGETHER, num_images=self.options.num_images,
            device=parameter.device, dtype=parameter.dtype,
        )  # fmt: skip
        for batch in batches:
            pixels = batch.pixels
            index = torch.arange(self.result.photos, self.result.photos + batch.size)
            if self.options.photos is not None:
                index %= self.options.photos
            held_out = index % every == every - 1
            for view in views.of(batch, held_out):
                tokens, call = embed(model, self.layout, view.call)
                tokens = tokens.float()
                parts[0].append(tokens[held_out])
                parts[1].append(tokens[~held_out])
            self.result.photos += batch.size
        assert call is not None  # iterate() refuses empty data
        if self.options.photos is not None:
            self.result.photos = min(self.result.photos, self.options.photos)
        self.geometry = self._geometry(
            None if pixels is None else (pixels.shape[-2], pixels.shape[-1])
        )
        sizes = {part.shape[1] for side in parts for part in side}
        if len(sizes) > 1:
            raise CalibrationError(
                f"The calibration images give {sorted(sizes)} tokens; calibrate on images of one size."
            )
        tokens = torch.cat([*parts[0], *parts[1]])
        if not torch.isfinite(tokens).all():
            raise CalibrationError(
                "The model's tokens are not finite on the calibration images; check the weights."
            )
        return tokens, call, sum(len(part) for part in parts[0])

    def _geometry(self, image_size: tuple[int, int] | None) -> Geometry:
        """The grid of the calibration images: that of the layers, else that of their pixels, else the model's."""
        fixed = next(
            (s.layer.grid for s in self.replacements.values() if s.layer.grid is not None), None
        )
        if fixed is None and image_size is not None:
            fixed = self.layout.grid_of(*image_size)
        height, width = fixed or self.layout.geometry().grid
        return Geometry(height, width, self.layout.num_prefix)

    def run(self) -> None:
        """Go through the blocks until nothing is left to fit; up to the first replacement both streams are the same."""
        blocks = self.layout.blocks
        names = [site.attention_name for site in blocks]
        places = [names.index(name) for name in self.replacements]
        with progress_bar("calibrating", "blocks", show=self.options.progress) as bar:
            task = bar.add_task("blocks", total=len(blocks))
            for index, site in enumerate(blocks):
                if index < min(places):
                    runner = self._runner(site)
                    self.original = self.converted = self._move(runner, self.original)
                elif index <= max(places) or self.refits:
                    self._block(site)
                bar.advance(task)

    def _chunks(self) -> Iterator[tuple[slice, bool]]:
        """Slices of images that are moved together, each wholly held out or wholly fitted."""
        total, split, step = len(self.original), self.num_held_out, self.step
        for start, stop, held_out in ((0, split, True), (split, total, False)):
            for at in range(start, stop, step):
                yield slice(at, min(at + step, stop)), held_out

    def _move(self, runner: BlockRunner, tokens: Tensor) -> Tensor:
        moved = torch.empty_like(tokens)
        for part, _ in self._chunks():
            moved[part] = runner(tokens[part])
        return moved

    def _block(self, site: BlockSite) -> None:
        original = self._runner(site)
        middle, self.original = self._original_streams(site, original)
        shim = self.replacements.get(site.attention_name)
        corrects = site.pre_norm and self.options.refit != "none"
        fitted = len(self.result.notes)
        attention: Tensor | None = None
        if shim is not None:
            runner = self._replace(site, shim, original, middle if corrects else None)
            self.refits = corrects and self.options.refit == "all"
        else:
            runner = original
            if self.refits:
                attention = self._correct_attention(site, runner, middle)
        del middle
        wanted = self.refits or (corrects and self.options.refit == "replaced" and shim is not None)
        if wanted and site.mlp_out is not None and self._may_correct(site.mlp_out):
            attention = self._attention(site, runner) if attention is None else attention
            self._correct_mlp(site, runner, site.mlp_out, attention)
        if shim is None and self.refits:
            notes = self.result.notes[fitted:]
            self.refits = any(note.residual < USEFUL for note in notes)
        if attention is None:
            self.converted = self._move(runner, self.converted)
        else:
            self.converted = self._move_on(site, runner, attention)
        self._check(site)

    def _may_correct(self, linear: nn.Linear) -> bool:
        """Whether a layer's weights can be changed: not if they are computed, nor if several blocks share them, since what
        helps one would change the others.
        """
        shared = any(self.holders[id(parameter)] > 1 for parameter in linear.parameters())
        return is_correctable(linear) and not shared

    def _attention(self, site: BlockSite, runner: BlockRunner) -> Tensor:
        """What the attention layer of the converted block returns, ``(M, N, D)``."""
        attention, convention = torch.empty_like(self.converted), _convention(site)
        for part, _ in self._chunks():
            attention[part] = runner.attend(self.converted[part], convention.unpack)
        return attention

    def _move_on(self, site: BlockSite, runner: BlockRunner, attention: Tensor) -> Tensor:
        """:meth:`_move` of the converted tokens, given the output of the attention layer; overwrites ``attention``."""
        convention = _convention(site)
        for part, _ in self._chunks():
            attention[part], _ = runner.after_attention(
                self.converted[part], attention[part], convention
            )
        return attention

    def _original_streams(self, site: BlockSite, runner: BlockRunner) -> tuple[Tensor, Tensor]:
        """The original model's tokens after the attention and after the MLP of a block."""
        middle, output = torch.empty_like(self.original), torch.empty_like(self.original)
        convention = _convention(site)
        for part, _ in self._chunks():
            tokens = self.original[part]
            output[part], attention = runner.run_noting_attention(tokens, convention.unpack)
            middle[part] = tokens + _scaled(attention, site.attention_scale)
        return middle, output

    def _replace(
        self,
        site: BlockSite,
        shim: ConvertedAttention,
        original: BlockRunner,
        middle: Tensor | None,
    ) -> BlockRunner:
        """Fit one replacement in fp32 and copy it into ``shim``; returns the converted block."""
        weights = _weights(original)
        rotary = original.rotary(self.converted[:1], _convention(site))
        samples = self._samples(original, weights, rotary)
        working = copy.deepcopy(shim).float().eval()
        if isinstance(shim.layer, LowRankDWAttention) and self.options.fidelity is not None:
            rank = choose_rank(weights, samples, self.geometry, self.options.fidelity)
            shim.layer = shim.layer.with_rank(rank)
            working.layer = copy.deepcopy(shim.layer).float()
        layer = working.layer
        layer.grid = self.geometry.grid  # the private copy has no patch embedding to learn it from
        fit = fit_layer(layer, weights, samples, self.geometry)
        self.result.notes.append(
            LayerNote(site.attention_name, "stencil", fit.residual, rank=fit.rank)
        )
        runner = self._runner(site, working)
        if middle is not None and not isinstance(layer, EnsembleDWAttention):
            for either in (layer, shim.layer):
                if isinstance(either, ReplacementAttention):
                    either.own_prefix_projection()
            self._correct_replacement(site, runner, layer, middle, rotary)
        shim.load_state_dict(working.state_dict())
        return runner

    def _samples(
        self, runner: BlockRunner, weights: AttentionWeights, rotary: Rotary | None
    ) -> Samples:
        def samples() -> Iterator[tuple[Tensor, Tensor]]:
            for part, _ in self._chunks():
                x = runner.attention_input(self.converted[part])
                yield x, self._true_rows(weights, x, rotary)

        return samples

    def _true_rows(self, weights: AttentionWeights, x: Tensor, rotary: Rotary | None) -> Tensor:
        with autocast(self.options.amp, x.device.type, cache=False):
            return true_rows(weights, x, rotary)

    def _runner(self, site: BlockSite, attention: nn.Module | None = None) -> BlockRunner:
        return BlockRunner(site, self.call, attention, amp=self.options.amp)

    def _correct_replacement(
        self,
        site: BlockSite,
        runner: BlockRunner,
        layer: Replacement,
        middle: Tensor,
        rotary: Rotary | None,
    ) -> None:
        """Correct the layer's Wo so that the residual stream comes back to the original model's."""
        rows = (
            slice(0, None)
            if isinstance(layer, ScatteredDWAttention)
            else slice(self.geometry.num_prefix, None)
        )
        fit = CorrectionFit(
            layer.proj.in_features, layer.dim, middle.device, bias=layer.proj.bias is not None
        )
        for part, held_out in self._chunks():
            tokens = self.converted[part]
            x = runner.attention_input(tokens)
            if isinstance(layer, ScatteredDWAttention):
                features = layer.rows(x, rotary=rotary)
            else:
                features = layer.patch_features(x, self.geometry)
            written = _scaled(layer.proj(features), site.attention_scale)
            fit.add(features, (middle[part] - tokens)[:, rows] - written, held_out=held_out)
        correction = fit.solve()
        _apply(layer.proj, correction, site.attention_scale)
        self.result.record(site.attention_name, "output", correction)

    def _correct_attention(
        self, site: BlockSite, runner: BlockRunner, middle: Tensor
    ) -> Tensor | None:
        """Correct Wo of an attention layer that is kept; returns its new output, or None if it has no Wo to correct."""
        own = _output_projection(site.attention)
        if own is None or not self._may_correct(own):
            return None
        proj = runner.counterpart(own)
        assert isinstance(proj, nn.Linear)
        weights = _weights(runner)
        rotary = runner.rotary(self.converted[:1], _convention(site))
        kept = self.converted.new_empty(*self.converted.shape[:2], proj.in_features)
        fit = CorrectionFit(
            proj.in_features, proj.out_features, middle.device, bias=proj.bias is not None
        )
        for part, held_out in self._chunks():
            tokens = self.converted[part]
            # By the weights: not every attention module calls its Wo as a module.
            features = self._true_rows(weights, runner.attention_input(tokens), rotary)
            error = middle[part] - tokens - _scaled(proj(features), site.attention_scale)
            fit.add(features, error, held_out=held_out)
            kept[part] = features
        self._update(site, runner, proj, fit.solve(), site.attention_scale, "attention output")
        written = kept if proj.in_features == proj.out_features else torch.empty_like(middle)
        for part, _ in self._chunks():
            written[part] = proj(kept[part])
        return written

    def _correct_mlp(
        self, site: BlockSite, runner: BlockRunner, mlp_out: nn.Linear, attention: Tensor
    ) -> None:
        """Correct the last layer of the MLP, given what the attention layer returns."""
        linear = runner.counterpart(mlp_out)
        assert isinstance(linear, nn.Linear)
        fit = CorrectionFit(
            linear.in_features, linear.out_features, attention.device, bias=linear.bias is not None
        )
        convention = _convention(site)
        for part, held_out in self._chunks():
            reached, (features,) = runner.after_attention(
                self.converted[part], attention[part], convention, linear
            )
            fit.add(features, self.original[part] - reached, held_out=held_out)
        self._update(site, runner, linear, fit.solve(), site.mlp_scale, "mlp output")

    def _update(
        self,
        site: BlockSite,
        runner: BlockRunner,
        linear: nn.Linear,
        correction: Correction,
        scale: Tensor | None,
        kind: str,
    ) -> None:
        """Apply a correction to the private copy and note the new values for the user's model."""
        path = next(name for name, module in runner.block.named_modules() if module is linear)
        name = f"{site.name}.{path}"
        self.result.record(name, kind, correction)
        if correction.strength == float("inf"):
            return
        _apply(linear, correction, scale)
        target = site.module.get_submodule(path)
        for leaf in ("weight", "bias"):
            value, parameter = getattr(linear, leaf), getattr(target, leaf)
            if parameter is not None:
                self.result.updates[f"{name}.{leaf}"] = value.detach().to(parameter.dtype).clone()

    def _check(self, site: BlockSite) -> None:
        """Note how far apart the streams are on held-out images.

        Raises:
            CalibrationError: values that are not finite.
        """
        part = slice(0, self.num_held_out or None)
        apart = drift(self.original[part], self.converted[part], self.geometry.num_prefix)
        if not math.isfinite(apart):
            narrow = self.options.amp == "fp16"
            raise CalibrationError(
                f"Calibration of {site.attention_name} gave values that are not finite; "
                + ("they may be too large for fp16. Use amp='bf16' or 'no'." if narrow else
                   "the images may be constant, or the weights extreme. Use more varied photos (at least about 50).")
            )  # fmt: skip
        self.result.drift[site.name] = apart


def _weights(runner: BlockRunner) -> AttentionWeights:
    adapter = adapter_for(runner.attention)
    if adapter is None:
        raise CalibrationError(f"No adapter knows {type(runner.attention).__name__}.")
    return adapter.weights(runner.attention)


def _convention(site: BlockSite) -> CallConvention:
    if isinstance(site.attention, ConvertedAttention):
        return site.attention.convention
    adapter = adapter_for(site.attention)
    if adapter is None:
        raise CalibrationError(
            f"{site.attention_name} ({type(site.attention).__name__}) is unknown to dwattn."
        )
    return adapter.convention(site.attention)


def _output_projection(attention: nn.Module) -> nn.Linear | None:
    """The linear layer inside an attention module that holds its Wo; None if there is none to correct."""
    adapter = adapter_for(attention)
    if adapter is None or refusal(attention) is not None:
        return None
    wo = adapter.weights(attention).wo
    return next(
        (m for m in attention.modules() if isinstance(m, nn.Linear) and m.weight is wo), None
    )


def _scaled(output: Tensor, scale: Tensor | None) -> Tensor:
    return output if scale is None else output * scale.float()


def _apply(linear: nn.Linear, correction: Correction, scale: Tensor | None) -> None:
    """Add a correction that was fitted after LayerScale to the layer before it."""
    weight, bias = correction.weight, correction.bias
    if scale is not None:
        gain = scale.double()
        inverse = torch.where(gain.abs() > 1e-8, 1 / gain, torch.zeros_like(gain))
        weight, bias = weight * inverse[:, None], bias * inverse
    linear.weight.add_(weight.to(linear.weight.dtype))
    if linear.bias is not None:
        linear.bias.add_(bias.to(linear.bias.dtype))
