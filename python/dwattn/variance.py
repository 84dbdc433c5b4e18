"""Streaming mean and variance of attention maps, and attention that updates them in the same pass.

``E = softmax(scale * q k^T)`` is never held for a whole layer: it is formed in tiles of a few rows
of one head for a few images, which stay in the cache while they are folded into the state and
multiplied by the values; by a compiled operator where one is chosen (:mod:`dwattn.backends`), else
in PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dwattn import backends, library, triton_ops
from dwattn.errors import ScoreError
from dwattn.finite import all_finite

#: A tile of E: many rows of a few images suit the matrix products. Its rows depend on N alone, so
#: that E of an image has the same bits however the images are batched (the rounding of a matrix
#: product depends on its number of rows).
_IMAGES_PER_TILE = 8
_ENTRIES_PER_IMAGE = 110_000
#: Entries of a tile that are folded at a time, per thread: their fp64 deviations should stay in its
#: cache.
_ENTRIES_PER_FOLD = 75_000
#: Devices other than the CPU want fewer, larger steps.
_DEVICE_FACTOR = 32

_Attend = Callable[[Tensor, Tensor, "Tensor | None", float], "Tensor | None"]


class AttentionVariance:
    """Welford state of E per ``(head, query, key)``, merged by Chan's formula (Eq. 14-15).

    ``n`` images with mean ``m`` and ``M2`` are joined by ``b`` images ``E_i`` through the
    deviations from the old mean, ``s1 = sum(E_i - m)`` and ``s2 = sum((E_i - m)^2)``::

        M2 <- M2 + s2 - s1^2 / (n + b),    m <- m + s1 / (n + b)

    which is Chan's formula for a batch. E is computed in fp32 (fp64 for fp64 queries), the state is
    fp64.

    Args:
        num_prefix: prefix tokens ``P`` in front of the patches.
        entries: ``"patches"`` keeps patch-patch entries, ``(n_h, N - P, N - P)``, and the mean mass
            of patch queries on each prefix token; ``"all"`` keeps ``(n_h, N, N)``.
        dtype: of the state.
    """

    def __init__(
        self, num_prefix: int = 0, entries: str = "patches", *, dtype: torch.dtype = torch.float64
    ) -> None:
        if entries not in ("patches", "all"):
            raise ScoreError(f"entries={entries!r} must be 'patches' or 'all'.")
        if num_prefix < 0:
            raise ScoreError(f"num_prefix={num_prefix} must be 0 or more.")
        self.num_prefix, self.entries, self.dtype = num_prefix, entries, dtype
        self.count = 0
        self._mean: Tensor | None = None
        self._m2: Tensor | None = None
        self._prefix: Tensor | None = None
        self._interrupted = False

    @staticmethod
    def nbytes(num_heads: int, tokens: int, num_prefix: int = 0, entries: str = "patches") -> int:
        """Bytes of the fp64 state of a layer with ``tokens`` = N."""
        size = tokens if entries == "all" else tokens - num_prefix
        prefix = num_prefix if entries == "patches" else 0
        return num_heads * size * (2 * size + prefix) * 8

    @property
    def mean(self) -> Tensor:
        """Mean of E: ``(n_h, n, n)``. The state itself, not a copy."""
        return self._filled()[0]

    @property
    def m2(self) -> Tensor:
        """Sum of squared deviations from the mean: ``(n_h, n, n)``. The state itself, not a copy."""
        return self._filled()[1]

    @property
    def std(self) -> Tensor:
        """Population standard deviation ``sqrt(M2 / N_s)``: ``(n_h, n, n)``."""
        return (self.m2.clamp_min(0) / self.count).sqrt_()

    @property
    def prefix_mean(self) -> Tensor:
        """Mean of E of the patch queries on each prefix key: ``(n_h, N - P, P)``."""
        mean = self.mean
        if self.entries == "all":
            return mean[:, self.num_prefix :, : self.num_prefix]
        if self._prefix is None:
            return mean[:, :, :0]
        return self._prefix

    def sigma(self) -> Tensor:
        """``Sigma_h`` (Eq. 16): sum of the standard deviations over the entries, ``(n_h,)``."""
        m2 = self.m2
        # One head at a time: the map of standard deviations is as large as half the state.
        return torch.stack([(head.clamp_min(0) / self.count).sqrt_().sum() for head in m2])

    def _filled(self) -> tuple[Tensor, Tensor]:
        if self._interrupted:
            raise ScoreError(
                "An update of this state was interrupted, so its numbers are not valid. Start anew."
            )
        if self._mean is None or self._m2 is None or self.count == 0:
            raise ScoreError(
                "The attention statistics are empty: no images were added. Call update(q, k) first."
            )
        return self._mean, self._m2

    def update(self, q: Tensor, k: Tensor, scale: float | None = None) -> None:
        """Add the attention maps of a batch.

        Args:
            q, k: ``(B, n_h, N, d_h)``, any strides.
            scale: factor of the logits, default ``1 / sqrt(d_h)``.

        Raises:
            ScoreError: NaN or infinite entries, or shapes that do not fit the state, which is left
                as it was.
        """
        self._run(q, k, None, scale)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        """Attention output ``E v``, ``(B, n_h, N, d_v)`` in the dtype of v; E is added to the state
        on the way.

        Args and raises as for :meth:`update`; ``v`` is ``(B, n_h, N, d_v)``.
        """
        if v.dim() != 4 or v.shape[:3] != k.shape[:3]:
            raise ScoreError(
                f"v has shape {tuple(v.shape)}, which does not fit k of shape {tuple(k.shape)}."
            )
        result = self._run(q, k, v, scale)
        assert result is not None
        return result

    @torch.no_grad()
    def _run(self, q: Tensor, k: Tensor, v: Tensor | None, scale: float | None) -> Tensor | None:
        self._check(q, k)
        # Autocast would round the operands of the matrix products to half precision.
        with torch.autocast(q.device.type, enabled=False):
            scale = q.shape[3] ** -0.5 if scale is None else scale
            operator = self._operator(q, v)
            if self._mean is None:
                self.allocate(q.shape[1], q.shape[2], q.device)
            self._interrupted = True
            out = (operator or self._attend)(q, k, v, scale)
            self._interrupted = False
        return out

    def _operator(self, q: Tensor, v: Tensor | None) -> _Attend | None:
        """The compiled operator for such tensors, or None where PyTorch runs."""
        backend = backends.choose("attention_variance", device=q.device.type, dtype=q.dtype)
        update = {
            "cpp": library.attention_variance_,
            "cuda": library.attention_variance_,
            "triton": triton_ops.attention_variance,
        }.get(backend)
        fits = v is None or (v.shape == q.shape and v.dtype == q.dtype)
        fits = fits and (backend != "cuda" or q.shape[3] <= library.CUDA_HEAD_DIM)
        if update is None or not fits or self.dtype != torch.float64:
            return None

        def attend(q: Tensor, k: Tensor, v: Tensor | None, scale: float) -> Tensor | None:
            assert self._mean is not None
            assert self._m2 is not None
            out = update(
                q,
                k,
                self._mean,
                self._m2,
                self.count,
                v=v,
                prefix_mean=self._prefix,
                num_prefix=self.num_prefix if self.entries == "patches" else 0,
                scale=scale,
            )
            self.count += len(q)
            return out

        return attend

    def _attend(self, q: Tensor, k: Tensor, v: Tensor | None, scale: float) -> Tensor | None:
        batch, heads, tokens, _ = q.shape
        compute = torch.float64 if q.dtype == torch.float64 else torch.float32
        q, keys = q.to(compute), k.to(compute).transpose(2, 3)
        out = None
        if v is not None:
            # Laid out as (B, N, n_h, d_v): joining the heads afterwards is a view.
            out = v.new_empty(batch, tokens, heads, v.shape[3])
            v = v.to(compute)
        factor = 1 if q.device.type == "cpu" else _DEVICE_FACTOR
        rows = min(tokens, max(1, factor * _ENTRIES_PER_IMAGE // tokens))
        fold = factor * _ENTRIES_PER_FOLD * torch.get_num_threads()
        for first in range(0, batch, _IMAGES_PER_TILE):
            images = slice(first, min(first + _IMAGES_PER_TILE, batch))
            count = images.stop - images.start
            fold_rows = min(rows, max(1, fold // (count * tokens)))
            tile = _Tile(count, rows, fold_rows, tokens, q, self.dtype)
            for head in range(heads):
                for start in range(0, tokens, rows):
                    stop = min(start + rows, tokens)
                    e = tile.softmax(q[images, head, start:stop], keys[images, head], scale)
                    if out is not None and v is not None:
                        out[images, start:stop, head] = torch.bmm(e, v[images, head])
                    for row in range(0, stop - start, fold_rows):
                        self._fold(e[:, row : row + fold_rows], head, start + row, tile)
            self.count += count
        return None if out is None else out.transpose(1, 2)

    def _fold(self, e: Tensor, head: int, start: int, tile: _Tile) -> None:
        """Add ``e (b, r, N)``, the query rows ``start ... start + r`` of one head."""
        assert self._mean is not None
        assert self._m2 is not None
        offset = 0 if self.entries == "all" else self.num_prefix
        skip = max(0, offset - start)
        if skip >= e.shape[1]:
            return
        images, total = e.shape[0], self.count + e.shape[0]
        rows = slice(start + skip - offset, start + e.shape[1] - offset)
        if self._prefix is not None:
            prefix = self._prefix[head, rows]
            mass = e[:, skip:, :offset].sum(0, dtype=self.dtype)
            prefix.add_(mass.sub_(prefix, alpha=images), alpha=1 / total)
        e = e[:, skip:, offset:]
        mean, m2 = self._mean[head, rows], self._m2[head, rows]
        if self.count == 0:
            mean.copy_(e[0])
        deviation = tile.deviation(e, mean)
        s1 = deviation.sum(0)
        m2.add_(deviation.mul_(deviation).sum(0)).addcmul_(s1, s1, value=-1 / total)
        mean.add_(s1, alpha=1 / total)

    def allocate(
        self, heads: int, tokens: int, device: torch.device, storage: Tensor | None = None
    ) -> None:
        """Make the empty state now instead of at the first update.

        Args:
            storage: zeros to use, 1-D in the state's dtype, :meth:`nbytes` long. Many states in one
                allocation do not fragment the heap.
        """
        size = tokens if self.entries == "all" else tokens - self.num_prefix
        prefix = self.num_prefix if self.entries == "patches" else 0
        if storage is None:
            count = heads * size * (2 * size + prefix)
            storage = torch.zeros(count, dtype=self.dtype, device=device)
        maps = heads * size * size
        self._mean = storage[:maps].view(heads, size, size)
        self._m2 = storage[maps : 2 * maps].view(heads, size, size)
        if prefix:
            self._prefix = storage[2 * maps :].view(heads, size, prefix)

    def _check(self, q: Tensor, k: Tensor) -> None:
        if self._interrupted:
            self._filled()
        if q.dim() != 4 or q.shape != k.shape or 0 in q.shape:
            raise ScoreError(
                "q and k must have one shape (B, n_h, N, d_h) with no zero in it, got "
                f"{tuple(q.shape)} and {tuple(k.shape)}."
            )
        if not q.is_floating_point() or q.dtype != k.dtype or q.device != k.device:
            raise ScoreError(
                f"q and k must be floating point of one dtype on one device, got {q.dtype} on "
                f"{q.device} and {k.dtype} on {k.device}."
            )
        if q.shape[2] <= self.num_prefix:
            raise ScoreError(
                f"N={q.shape[2]} tokens leave no patches after num_prefix={self.num_prefix}."
            )
        size = q.shape[2] - (self.num_prefix if self.entries == "patches" else 0)
        if self._mean is not None and self._mean.shape != (q.shape[1], size, size):
            raise ScoreError(
                f"This state holds attention maps of shape {tuple(self._mean.shape)}, the batch "
                f"makes ({q.shape[1]}, {size}, {size}): images of another resolution or another "
                "layer cannot be added."
            )
        if not all_finite(q, k):
            name = "k" if all_finite(q) else "q"
            raise ScoreError(
                f"{name} has NaN or infinite entries; the attention maps of this batch are not "
                "defined."
            )

    def merge(self, other: AttentionVariance) -> AttentionVariance:
        """Join the images of ``other`` to this state (Chan's formula) and return it; ``other`` is
        unchanged.

        Raises:
            ScoreError: states of different layers, resolutions or settings.
        """
        if (self.num_prefix, self.entries) != (other.num_prefix, other.entries):
            raise ScoreError(
                f"Cannot merge a state with num_prefix={other.num_prefix}, "
                f"entries={other.entries!r} into one with num_prefix={self.num_prefix}, "
                f"entries={self.entries!r}."
            )
        if other.count == 0 and not other._interrupted:
            return self
        mean, m2 = other._filled()
        if self.count == 0 and not self._interrupted:
            self._mean, self._m2 = mean.to(self.dtype, copy=True), m2.to(self.dtype, copy=True)
            self._prefix = (
                None if other._prefix is None else other._prefix.to(self.dtype, copy=True)
            )
            self.count = other.count
            return self
        own_mean, own_m2 = self._filled()
        if own_mean.shape != mean.shape:
            raise ScoreError(
                f"Cannot merge maps of shape {tuple(mean.shape)} into maps of shape "
                f"{tuple(own_mean.shape)}."
            )
        total = self.count + other.count
        delta = mean.to(own_mean) - own_mean
        own_mean.add_(delta, alpha=other.count / total)
        own_m2.add_(m2.to(own_m2)).addcmul_(delta, delta, value=self.count * other.count / total)
        if self._prefix is not None and other._prefix is not None:
            self._prefix.lerp_(other._prefix.to(self._prefix), other.count / total)
        self.count = total
        return self

    def merge_ranks(self, group: torch.distributed.ProcessGroup | None = None) -> AttentionVariance:
        """Replace this state by that of all processes of ``group``, the same bits on each of them.

        Two sums: ``m = sum(n_i m_i) / n``, then ``M2 = sum(M2_i + n_i (m_i - m)^2)``, which is
            Chan's formula
        for many states. Every process needs a state of the same shape.
        """
        mean, m2 = self._filled()
        count = torch.tensor([float(self.count)], dtype=torch.float64, device=mean.device)
        torch.distributed.all_reduce(count, group=group)
        total = int(count.item())
        pooled = mean * (self.count / total)
        torch.distributed.all_reduce(pooled, group=group)
        mean.sub_(pooled)
        m2.addcmul_(mean, mean, value=self.count)
        torch.distributed.all_reduce(m2, group=group)
        self._mean = pooled
        if self._prefix is not None:
            self._prefix.mul_(self.count / total)
            torch.distributed.all_reduce(self._prefix, group=group)
        self.count = total
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that safetensors can store: ``mean``, ``m2``, ``prefix_mean``, ``count`` and the
        settings.
        """
        mean, m2 = self._filled()
        # Clones: safetensors refuses tensors that share memory.
        state = {
            "mean": mean.clone(),
            "m2": m2.clone(),
            "count": torch.tensor([self.count]),
            "num_prefix": torch.tensor([self.num_prefix]),
            "patches_only": torch.tensor([int(self.entries == "patches")]),
        }
        if self._prefix is not None:
            state["prefix_mean"] = self._prefix.clone()
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> AttentionVariance:
        """The inverse of :meth:`state_dict`.

        Raises:
            ScoreError: missing tensors, or shapes and values that cannot be a state.
        """
        missing = sorted({"mean", "m2", "count", "num_prefix", "patches_only"} - set(state))
        if missing:
            raise ScoreError(f"The state of an AttentionVariance lacks {', '.join(missing)}.")
        numbers = (state["count"], state["num_prefix"], state["patches_only"])
        if any(t.numel() != 1 or t.is_floating_point() or t.is_complex() for t in numbers):
            raise ScoreError(
                "count, num_prefix and patches_only of the state of an AttentionVariance must be "
                f"one integer each, got {', '.join(f'{t.dtype} {tuple(t.shape)}' for t in numbers)}."
            )
        count, num_prefix, patches_only = (int(t.item()) for t in numbers)
        mean, m2 = state["mean"], state["m2"]
        if not (mean.is_floating_point() and m2.dtype == mean.dtype):
            raise ScoreError(
                "mean and m2 of the state of an AttentionVariance must be floating point of one "
                f"dtype, got {mean.dtype} and {m2.dtype}."
            )
        if mean.dim() != 3 or mean.shape != m2.shape or mean.shape[1] != mean.shape[2] or count < 1:
            raise ScoreError(
                f"Not a state of an AttentionVariance: mean {tuple(mean.shape)}, m2 "
                f"{tuple(m2.shape)}, count {count}."
            )
        if not all_finite(mean, m2):
            raise ScoreError("The state of an AttentionVariance holds NaN or infinite entries.")
        entries = "patches" if patches_only else "all"
        made = cls(num_prefix, entries, dtype=mean.dtype)
        made.count, made._mean, made._m2 = count, mean.clone(), m2.clone()
        if entries == "patches" and num_prefix:
            expected = (mean.shape[0], mean.shape[1], num_prefix)
            prefix = state.get("prefix_mean")
            if prefix is None or tuple(prefix.shape) != expected or prefix.dtype != mean.dtype:
                raise ScoreError(
                    f"The state of an AttentionVariance lacks prefix_mean of shape {expected} in "
                    f"{mean.dtype}."
                )
            made._prefix = prefix.clone()
        return made

    def __repr__(self) -> str:
        shape = None if self._mean is None else tuple(self._mean.shape)
        settings = f"num_prefix={self.num_prefix}, entries={self.entries!r}"
        return f"AttentionVariance(count={self.count}, maps={shape}, {settings})"


class _Tile:
    """Buffers: E of a tile, in the dtype of ``like``, and deviations of the rows being folded."""

    def __init__(
        self, images: int, rows: int, fold_rows: int, tokens: int, like: Tensor, state: torch.dtype
    ) -> None:
        self.images, self.tokens = images, tokens
        self._e = like.new_empty(images * rows * tokens)
        self._deviation = like.new_empty(images * fold_rows * tokens, dtype=state)

    def softmax(self, q: Tensor, keys: Tensor, scale: float) -> Tensor:
        """``softmax(scale * q keys)`` for ``q (b, r, d)`` and ``keys (b, d, N)``: ``(b, r, N)``,
        valid until the next call.
        """
        e = self._e[: self.images * q.shape[1] * self.tokens].view(
            self.images, q.shape[1], self.tokens
        )
        # beta=0: what the buffer held does not matter, not even if it was NaN.
        torch.baddbmm(e, q, keys, beta=0, alpha=scale, out=e)
        return torch.softmax(e, dim=-1, out=e)

    def deviation(self, e: Tensor, mean: Tensor) -> Tensor:
        """``e - mean`` in the dtype of the mean: ``(b, r, n)``, valid until the next call."""
        buffer = self._deviation[: e.numel()].view(e.shape)
        return buffer.copy_(e).sub_(mean)
