"""Register with transformers whenever it is imported, before or after us. Standard library only.

transformers discovers nothing by itself, and `import loftq` must stay light. So importing loftq
leaves a finder in sys.meta_path that waits for `transformers.quantizers` and registers the config
and the quantizer right after that package has run.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

TARGET = "transformers.quantizers"


def install() -> None:
    """Register now if transformers is imported, otherwise once it is. Never raises."""
    loaded = sys.modules.get(TARGET)
    if loaded is not None and hasattr(loaded, "register_quantizer"):
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TARGET:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """The real loader, with a registration after it."""

    def __init__(self, inner: Loader) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> object:  # get_source, is_package, resource readers
        return getattr(self._inner, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        _register()


def _register() -> None:
    try:
        # The module registers as it is imported. It may be the one that imports transformers just
        # now, and will then register when it has finished.
        importlib.import_module("loftq.integrations.transformers")
    except Exception as error:  # transformers must stay usable whatever is wrong with us
        warnings.warn(
            f"loftq could not register with transformers ({type(error).__name__}: {error}); models "
            "quantized by loftq will not load. `import loftq.integrations.transformers` shows why.",
            stacklevel=2,
        )
