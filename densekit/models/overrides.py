"""Whether a subclass has changed what a quicker way would pass over."""

from typing import Any


def unchanged(instance: Any, cls: type, *methods: str) -> bool:
    """Whether an object has these methods as a class has them, not another class's or its own.

    Args:
        instance: whose methods are asked for.
        cls: of which they are to be.
        *methods: their names.
    """
    return all(getattr(getattr(instance, name), '__func__', None) is getattr(cls, name) for name in methods)
