"""Keep state that a forward writes into a model moving once per step: buffers, and parameters that are not trained.

Most buffers never move. The first step copies all of them and finds out which do move, by identity, autograd version,
address and value, as far as the copies take no more memory than the trained parameters (or 64 MiB). Later steps copy
only those, and once each other buffer of at most 4,096 elements; the rest is only watched, which takes a microsecond
per buffer. If a large buffer begins to move later, it moves once in that step too, but the later passes of that step
see its new value.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .models import modules_in_reach
from .places import ABSENT, STATISTICS, Place, can_be_copied, copied, copy_all, differing, size_of, write

_PROCESS = os.getpid()
_IS_TRAINED = operator.attrgetter("requires_grad")

LEAST_BYTES = 64 << 20
"""Bytes that the copies of the first step may always take, even if the trained parameters take less."""

_under_way: dict[int, list[nn.Module]] = {}
"""The modules of each step in progress. Copy it by ``list()`` to iterate: other threads take steps too."""


def modules_of(model: nn.Module | None) -> list[nn.Module]:
    """Return all modules, without the nested generators of ``model.modules()``, which take long."""
    found: list[nn.Module] = []
    seen: set[nn.Module | None] = {None}
    rest = [model]
    while rest:
        module = rest.pop()
        if module is None or module in seen:
            continue
        seen.add(module)
        found.append(module)
        rest.extend(reversed(module._modules.values()))
    return found


class ForwardState:
    """Restores a model's buffers, and its parameters that are not trained, so that they move once per step.

    A step lasts from :meth:`enter` to :meth:`exit`, with :meth:`begin` at the start of each pass. All passes see the
    values at entry. On leaving, the model has, bit for bit, the values after the first pass (with
    ``begin(keep_last=True)``, after the last); an undone step restores the values at entry. Buffers that are written in
    place keep their identity and address, and modules are not switched, so that a compiled model is not recompiled. One
    object serves many steps: the first one finds out which buffers move.

    >>> model = nn.BatchNorm1d(2)
    >>> state = ForwardState()
    >>> state.enter(model)
    >>> for scale in (1.0, 100.0):
    ...     state.begin()
    ...     _ = model(scale * torch.ones(4, 2))
    >>> state.exit(undo=False)
    >>> model.running_mean, int(model.num_batches_tracked)
    (tensor([0.1000, 0.1000]), 1)
    """

    def __init__(self) -> None:
        self._layout: Any = None
        self._modules: list[nn.Module] = []
        self._places: list[Place] = []  # first those of buffers, then those of parameters
        self._buffers = 0
        self._entered = self._learning = self._learnt_several = False
        self.active = False
        """True during a step that has values to restore."""
        self.forgotten: list[str] = []
        """Buffers that move in modules in reach of the calling code, if no model holds all parameters."""

    @property
    def moves_parameters(self) -> bool:
        """True if a parameter of the optimizer moves without being trained; in the first step, if one may move."""
        return self._learning or any(place.moves for place in self._places[self._buffers :])

    def enter(
        self,
        model: nn.Module | None,
        params: Sequence[Tensor] = (),
        taking_part: Sequence[int] = (),
        left_out: Sequence[str] = (),
        *,
        several: bool = True,
        by_gradient: bool = True,
        capturing: bool = False,
    ) -> None:
        """Prepare for the first pass of a step.

        Args:
            model: the module being trained.
            params: the parameters of the optimizer.
            taking_part: for each of ``params``, whether it is being trained; this may change during the step.
            left_out: patterns of the names of buffers that may move in every pass.
            several: whether the step may have several passes.
            by_gradient: whether each trained parameter has a gradient after the first pass.
            capturing: whether a CUDA graph is being captured.

        Raises:
            RuntimeError: with several passes, a lazy module before its first forward.
            ValueError: a pattern in ``left_out`` that matches no buffer.
        """
        self._model, self._params, self._taking_part, self._left_out = model, params, taking_part, left_out
        self._capturing = capturing
        self._begun = self._looked = self._returned = self._settled = self._keep_last = False
        self._elsewhere: list[tuple[str, Place]] = []
        # except those handled by an enclosing step: two optimizers may step in lockstep over a model
        others = list(_under_way.values())
        self._taken = {id(module) for modules in others for module in modules} if others else set()
        self._modules = self._own_modules() if model is not None else []
        layout = self._at_entry = self._layout_of(self._modules)
        self._learning = layout != self._layout or (several and not self._learnt_several)
        if self._learning:
            if several:
                self._refuse_lazy()
            self._layout = None  # unknown until this step has found the places
            self._learnt_several = several
            # (in a forked process, torch would wait forever for threads lost in the fork)
            is_whole = not capturing and os.getpid() == _PROCESS
            self._find(with_trained=by_gradient and is_whole, several=several)
            if several and not set(params) <= set(model.parameters() if model is not None else ()):
                self._look_around()
        elif self._places:
            self._copy_what_moves()
        self._entered = True
        self.active = self._learning or bool(self._places)
        if self._modules:
            _under_way[id(self)] = self._modules

    def _own_modules(self) -> list[nn.Module]:
        modules = modules_of(self._model)
        return [module for module in modules if id(module) not in self._taken] if self._taken else modules

    def _layout_of(self, modules: list[nn.Module]) -> Any:
        """Return a key: if it changes, find places anew. It has modules, modes, buffer names and frozen parameters."""
        frozen = list(map(_IS_TRAINED, self._params))
        if not modules:
            return frozen, [], []
        names = [(id(own), *own.keys()) for module in modules if (own := module._buffers)]
        return frozen, [module.training for module in modules], names

    def _find(self, *, with_trained: bool, several: bool) -> None:
        """Find all places, and copy their values, small ones first, as far as memory allows."""
        exempt = self._exempt()
        buffers = [
            Place(tensor, own, name, moves=tensor is not None and module.training and name in STATISTICS)
            for module in self._modules
            for own in [module._buffers]
            for name, tensor in own.items()
            if (id(own), name) not in exempt
        ]
        buffers = [place for place in buffers if place.tensor is None or can_be_copied(place.tensor)]
        others = {
            id(param): Place(param, own, name)
            for module in reversed(self._modules)
            for own in [module._parameters]
            for name, param in own.items()
            if param is not None
        }
        params = [others.pop(id(param), Place(param)) for param in self._params]
        for i, place in enumerate(params):
            place.position = i
        params += others.values()
        params = [place for place in params if with_trained or not place.tensor.requires_grad]
        params = [place for place in params if can_be_copied(place.tensor)]
        self._places, self._buffers = buffers + params, len(buffers)
        left = max(LEAST_BYTES, sum(size_of(param) for param in self._params if several and param.requires_grad))
        with torch.set_grad_enabled(False):
            for place in sorted(self._places, key=lambda place: (place.may_be_trained, size_of(place.tensor))):
                place.note()
                place.keeps = place.is_small and not place.may_be_trained
                left -= size_of(place.tensor)
                if left >= 0 or place.keeps:
                    place.copy()

    def _refuse_lazy(self) -> None:
        """Raise if a lazy module has no values yet."""
        named: list[tuple[str, Tensor]] = [(f"parameter {i}", param) for i, param in enumerate(self._params)]
        if self._model is not None:
            named = [*self._model.named_parameters(), *self._model.named_buffers(), *named]
        for name, tensor in named:
            if is_lazy(tensor):
                raise RuntimeError(
                    f"{name} is not initialized: it belongs to a lazy module, whose first forward gives it "
                    "its shape. A step of several passes needs initialized parameters: run the model once, "
                    "under torch.no_grad(), before the first step"
                )

    def _exempt(self) -> set[tuple[int, str]]:
        """Return the buffers that the patterns of ``left_out`` match."""
        if self._model is None or not self._left_out:
            return set()
        names = {
            (id(module._buffers), name): f"{prefix}.{name}".replace("_orig_mod.", "").removeprefix("module.").strip(".")
            for prefix, module in self._model.named_modules(remove_duplicate=False)
            for name in module._buffers.keys()  # noqa: SIM118 - those of a script module cannot be iterated over
        }
        for pattern in self._left_out:
            if not any(fnmatchcase(name, pattern) for name in names.values()):
                raise ValueError(
                    f"moving_buffers: {pattern!r} fits no buffer of the model, which has "
                    f"{', '.join(names.values()) or 'none'}"
                )
        return {key for key, name in names.items() if any(fnmatchcase(name, pattern) for pattern in self._left_out)}

    def _look_around(self) -> None:
        """Watch the buffers of modules within reach of the calling code that hold our parameters, beside the model."""
        ours, given = set(map(id, self._params)), self._model
        known = self._taken | set(map(id, given.modules() if given is not None else ()))
        for model in modules_in_reach(self._params):
            for prefix, module in model.named_modules():
                trained = [p for p in module._parameters.values() if p is not None and p.requires_grad]
                if id(module) in known or not ours.issuperset(map(id, trained)) or (given is not None and not trained):
                    continue  # another step restores it, or another optimizer trains it
                for name, tensor in module._buffers.items():
                    place = Place(tensor, module._buffers, name)
                    if tensor is None or can_be_copied(tensor):
                        place.note()
                        if place.is_small:
                            place.copy()
                        self._elsewhere.append((f"{prefix}.{name}".strip("."), place))

    def _copy_what_moves(self) -> None:
        pairs: list[tuple[Tensor, Tensor]] = []
        with torch.set_grad_enabled(False):
            for place in self._places:
                before, version, address = place.tensor, place.version, place.address
                place.tensor = tensor = place.now()
                place.note()
                if not place.keeps and not place.moves:
                    continue
                # (a CUDA graph must not write to memory that it does not own)
                start, is_other = place.start, tensor is not before or address != place.address
                if start is None or is_other or start.shape != tensor.shape or self._capturing:
                    place.copy()
                elif place.moves or version != place.version:
                    pairs.append((start, tensor))
            copy_all(pairs)

    def start_anew(self) -> None:
        """Let passes start from the present values. A block that raises still restores the values at entry."""
        with torch.set_grad_enabled(False):
            for place in self._places:
                place.note()
                if place.start is not None:
                    place.entry = place.start
                    place.copy()

    def _trained(self, place: Place) -> bool:
        return place.position >= 0 and bool(self._taking_part[place.position])

    def look(self) -> list[int]:
        """Find out, after the first pass, which values moved. Parameters that have a gradient count as trained.

        Return the positions of trained parameters that were written to nevertheless, as far as that is known.
        """
        if not self.active or self._looked:
            return []
        self._looked = True
        with torch.set_grad_enabled(False):
            trained = self._drop_trained()
            written = [place.position for place in trained if place.shows()]
            if self._learning and self._learnt_several and not self._capturing and not written:
                written = [place.position for place in differing(trained)]
            self._find_silent()
            for place in self._places:
                place.moves = place.moved()
            if self._learning:
                # other buffers of the same module may begin to move later, without a trace
                movers = {id(place.own) for place in self._places[: self._buffers] if place.moves}
                for place in self._places[: self._buffers]:
                    place.moves = place.moves or (place.keeps and id(place.own) in movers)
            if self._learning and not (written and self._learnt_several):
                # another optimizer trains those that this pass did not change
                self._places = [p for p in self._places if p.moves or p.position >= 0 or not p.may_be_trained]
                self._find_new()
            if self._elsewhere:
                moved = set(differing([place for _, place in self._elsewhere]))
                self.forgotten = [name for name, place in self._elsewhere if place in moved or place.moved()]
                self._elsewhere = []
        return written

    def _drop_trained(self) -> list[Place]:
        """Drop the places of parameters with a gradient. Return the dropped places of this optimizer."""
        rest = [p for p in self._places[self._buffers :] if getattr(p.tensor, "grad", None) is not None]
        trained = [place for place in rest if place.position >= 0 or place.tensor.requires_grad]
        if trained:
            gone = set(trained)
            self._places = [place for place in self._places if place not in gone]
        return [place for place in trained if place.position >= 0]

    def _find_silent(self) -> None:
        """Compare values, in the first step, to find changes that left no other trace."""
        if not self._learning:
            return
        unseen = [place for place in self._places if not place.moved() and place.start is not None]
        for place in unseen if self._capturing else differing(unseen):
            place.moves = True

    def _find_new(self) -> None:
        """Find the buffers that the first pass has added."""
        modules, known = self._own_modules(), self._known() | self._exempt()
        for module in modules:
            own = module._buffers
            for name, tensor in own.items():
                if (id(own), name) not in known and (tensor is None or can_be_copied(tensor)):
                    # the earlier values in a new module are unknown
                    before = ABSENT if module in self._modules else tensor
                    self._places.insert(0, Place(before, own, name, moves=True))
                    self._buffers += 1
        if not self._capturing:
            self._layout = self._layout_of(modules)

    def add(self, positions: Sequence[int]) -> None:
        """Add parameters without a gradient that were seen to move."""
        if positions and self._entered:
            self._begun = True  # a pass has already run
            known = {place.position for place in self._places[self._buffers :]}
            for i in positions:
                if i not in known and can_be_copied(self._params[i]):
                    self._places.append(Place(self._params[i], position=i, moves=True))
                    self.active = True

    def begin(self, *, keep_last: bool = False) -> None:
        """Start a pass: keep the values after the first pass, and restore those at entry.

        Args:
            keep_last: whether to keep the values after the last pass instead, as known by now; once true, it stays so.
        """
        self._keep_last = keep_last
        if not self.active or not self._begun:
            self._begun = True
            return
        self.look()
        with torch.set_grad_enabled(False):
            self._find_silent()
            moved = [place for place in self._places if place.moved() and not self._trained(place)]
            if not self._returned:
                self._returned = True
                for place in moved:
                    place.first, place.then = True, place.now()
                    if not keep_last:
                        place.after = copied(place.then)
            self._put_back(moved)

    def _put_back(self, moved: Sequence[Place], *, to_entry: bool = False) -> None:
        """Restore the values at the start of the passes, or at entry. Values without a copy stay as they are."""
        pairs: list[tuple[Tensor, Tensor]] = []
        for place in moved:
            is_same = place.now() is place.tensor
            if not is_same:
                place.put(place.tensor)
            is_other = to_entry and place.entry is not None
            values = place.entry if is_other else place.start
            if values is not None and (is_other or (is_same and place.moves) or place.shows()):
                write(place.tensor, values, place.address, pairs)
        copy_all(pairs)
        for place in moved:
            place.note()

    def _put_after(self, places: Sequence[Place]) -> None:
        """Restore the values after the first pass."""
        pairs: list[tuple[Tensor, Tensor]] = []
        for place in places:
            if place.own is not None:
                place.put(place.then)
            if place.after is not None:
                address = place.address if place.then is place.tensor else place.then.data_ptr()
                write(place.then, place.after, address, pairs)
        copy_all(pairs)

    def settle(self) -> None:
        """Restore the values after the first pass; called after the last pass and before the update."""
        if not self.active or self._settled:
            return
        self._settled = True
        self.look()
        if self._returned and not self._keep_last:
            with torch.set_grad_enabled(False):
                self._find_silent()
                places = [place for place in self._places if not self._trained(place)]
                self._put_back([place for place in places if not place.first and place.moved()])
                self._put_after([place for place in places if place.first])

    def exit(self, *, undo: bool) -> None:
        """End the step; with ``undo``, restore the values at entry."""
        if not self._entered:
            return
        _under_way.pop(id(self), None)
        if undo and (self.active or self._modules):
            with torch.set_grad_enabled(False):
                self._drop_trained()
                self._remove_what_is_new()
                self._find_silent()
                self._put_back([p for p in self._places if p.entry is not None or p.moved()], to_entry=True)
        elif self.active:
            self.settle()
        self._entered = self.active = False
        for place in self._places:
            place.first, place.then, place.after, place.entry = False, None, None, None
            if self._capturing or not place.keeps:
                place.start = None
        self._modules, self._params = [], ()

    def _known(self) -> set[tuple[int, str]]:
        """Return the buffers that existed at entry."""
        return {(own, name) for own, *names in self._at_entry[2] for name in names}

    def _remove_what_is_new(self) -> None:
        """Remove the buffers that undone passes have added."""
        known = self._known()
        for module in self._modules:
            own = module._buffers
            for name in [*own.keys()]:
                if (id(own), name) not in known:
                    del own[name]
