"""A bounded cache of the teacher's features, for views that are seen more than once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dwattn.finetune.features import Features

Key = tuple[int, int]
#: Images that go through the teacher together while the cache is filled. Fixed, because the last bits of a
#: result depend on it, and a resumed run must find the same cache.
FILL_BATCH = 16


@dataclass
class TeacherCache:
    """Features by ``(image, view)``, kept on the CPU in the teacher's dtype.

    It is filled before training and does not change afterwards: what a step sees then depends on the step alone,
    and a resumed run repeats it to the last bit.

    Args:
        limit: bytes; 0 keeps nothing.
        used: bytes.
        source: of which views it holds the features, for its user to compare.
    """

    limit: int = 0
    used: int = 0
    source: object = None
    _rows: dict[Key, list[Tensor]] = field(default_factory=dict)
    _form: Features | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def clear(self) -> None:
        """Forget everything."""
        self._rows.clear()
        self._form, self.used, self.source = None, 0, None

    def fill(
        self,
        items: Iterable[tuple[Key, Tensor]],
        teach: Callable[[Tensor], Features],
        device: torch.device,
        advance: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Keep the features of ``(key, pixels (3, H, W))`` items, in their order, until the limit is reached."""
        pending: list[tuple[Key, Tensor]] = []
        for item in items:
            pending.append(item)
            if len(pending) == FILL_BATCH:
                if not self._add(pending, teach, device):
                    return
                advance(len(pending))
                pending = []
        if pending:
            self._add(pending, teach, device)
            advance(len(pending))

    def _add(
        self,
        items: list[tuple[Key, Tensor]],
        teach: Callable[[Tensor], Features],
        device: torch.device,
    ) -> bool:
        found = teach(torch.stack([pixels for _, pixels in items]).to(device))
        size = sum(t.numel() * t.element_size() for t in found.tensors())
        if self.used + size > self.limit:
            return False
        self._form, self.used = found.like([t[:0] for t in found.tensors()]), self.used + size
        columns = [t.cpu() for t in found.tensors()]
        for row, (key, _) in enumerate(items):
            self._rows[key] = [column[row].clone() for column in columns]
        return True

    def get(
        self, keys: Sequence[Key] | None, pixels: Tensor, teach: Callable[[Tensor], Features]
    ) -> Features:
        """Features of a batch; images that are not kept go through the teacher together."""
        known = [] if keys is None else [i for i, key in enumerate(keys) if key in self._rows]
        if keys is None or not known:
            return teach(pixels)
        assert self._form is not None
        missing = [i for i in range(len(keys)) if i not in set(known)]
        rows: dict[int, list[Tensor]] = {
            i: [t.to(pixels.device) for t in self._rows[keys[i]]] for i in known
        }
        if missing:
            fresh = teach(pixels[missing])
            for row, i in enumerate(missing):
                rows[i] = [t[row] for t in fresh.tensors()]
        columns = zip(*(rows[i] for i in range(len(keys))), strict=True)
        return self._form.like([torch.stack(column) for column in columns])
