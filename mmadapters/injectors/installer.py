"""`Runtime` installs the hooks that plans need on the modules of an encoder, and removes them.

A hook looks up which adapters are active at its site and applies them. If none is, it changes
nothing. There are three mechanisms: hooks on sublayers, blocks and whole towers; hooks on leaves
that are really called; and a subclass in the place of a module's class if the library reads a
weight itself or computes attention inside (`raw_weights.py`). `kinds.py` lists them.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping

from torch import nn

from ..sites.sitemap import Grid, SiteMap
from .intercept import Interceptors
from .kinds import KINDS, HookKey, Removable, SiteIndex, Spot, composed, needed
from .plan import Plan
from .raw_weights import is_replaced
from .state import Hook, State, ThreadState


class Runtime:
    """Installs hooks on the modules of an encoder, and holds the `State` that they read.

    Attributes:
        sites: where the encoder can be adapted.
        state: what the hooks read.
        interceptors: stand in for modules that a pass does not run.
    """

    def __init__(self, sites: SiteMap, backbone: nn.Module) -> None:
        self.sites = sites
        self.state = State()
        self.interceptors = Interceptors(self.state, sites)
        self._index = SiteIndex(sites, backbone)
        # The hooks that each adapter or fusion needs, and how many of them need each hook.
        self._held: dict[str, tuple[HookKey, ...]] = {}
        self._users: Counter[HookKey] = Counter()
        # What composed plans have needed beyond the hooks of their members.
        self._composed: dict[HookKey, None] = {}
        self._handles: dict[HookKey, list[Removable]] = {}

    @property
    def active(self) -> Plan:
        """The plan that acts in threads without a plan of their own; it can be set."""
        return self.state.active

    @active.setter
    def active(self, plan: Plan) -> None:
        self.state.active = plan

    @property
    def local(self) -> ThreadState:
        """The part of the state that each thread has for itself."""
        return self.state.local

    def plan(self) -> Plan:
        """Returns the plan that is active in this thread."""
        return self.state.plan()

    def pinned(self, plan: Plan) -> contextlib.AbstractContextManager[None]:
        """Inside the block, in this thread alone, `plan` is active."""
        return self.state.pinned(plan)

    def grids(self) -> dict[tuple[str, str], Grid]:
        """Returns the patch grids of the images that are being encoded, by where they are read."""
        return self.state.grids()

    def seeing(
        self, grids: Mapping[tuple[str, str], Grid]
    ) -> contextlib.AbstractContextManager[None]:
        """Inside the block, in this thread, hooks read `grids`; see `State.seeing`."""
        return self.state.seeing(grids)

    def recompile(self) -> None:
        """Makes torch.compile compile anew whatever it has compiled of the encoder so far."""
        self.state.recompile()

    @property
    def attends_to_images(self) -> bool:
        """Some adapter, active or not, lets texts attend to images."""
        return HookKey("image", "vision") in self._handles

    def hold(self, name: str, plan: Plan) -> None:
        """Installs the hooks that `plan` needs. They stay until `release` is called with `name`.

        Its cost does not depend on how many plans are held.
        """
        needs = (key for entry in plan.entries() for key in needed(self._index, *entry))
        self._held[name] = tuple(dict.fromkeys(needs))
        self._users.update(self._held[name])
        self._sync()

    def release(self, name: str) -> None:
        """Removes the hooks that only the plan held under `name` needed."""
        for key in self._held.pop(name, ()):
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key]
        self._sync()

    def _sync(self) -> None:
        """Installs the hooks that are needed and removes all others."""
        if not self._users:
            self._composed.clear()
        wanted = {**self._users, **self._composed}
        # Hooks that must run last are put on anew, behind those that come now.
        for key in [key for key in self._handles if key not in wanted or KINDS[key.kind].last]:
            self._remove(key)
        for key in sorted(wanted, key=lambda key: KINDS[key.kind].last):
            if key not in self._handles:
                self._install(key)
        self.recompile()

    def admit(self, plan: Plan) -> None:
        """Installs, from now on, the hooks that a composed plan needs and its members do not."""
        new = [key for key in composed(self._index, plan) if key not in self._handles]
        for key in new:
            self._composed[key] = None
            self._install(key)
        if new:
            self.recompile()

    def clear(self) -> None:
        """Removes every hook and gives every module its own class back."""
        self._held.clear()
        self._users.clear()
        self._sync()
        self.state.reset()

    def _install(self, key: HookKey) -> None:
        spot = Spot(self.state, self._index, key.site, key.detail)
        self._handles[key] = list(KINDS[key.kind].install(spot))

    def _remove(self, key: HookKey) -> None:
        for handle in self._handles.pop(key, ()):
            handle.remove()


def is_adapted(module: nn.Module) -> bool:
    """Says whether some runtime has hooks or subclasses on the module or on a part of it."""
    return any(
        is_replaced(part)
        or any(isinstance(hook, Hook) for hook in part._forward_hooks.values())
        or any(isinstance(hook, Hook) for hook in part._forward_pre_hooks.values())
        for part in module.modules()
    )
