"""``dataclasses`` without generated code: the same classes, cheap enough for a launcher.

The standard module imports ``inspect`` and compiles half a dozen methods per class, which is a
quarter of the time that a launch takes to begin (docs/decisions/start-up.md).  Here the methods are
shared by all classes.  Type checkers are shown the standard ones, so whatever they accept is meant
as there.  Only what this project uses is here: ``frozen``, ``kw_only`` and ``field`` with a
``default``, a ``default_factory`` or ``compare``; no base classes that are dataclasses, no
``__post_init__``, no ``ClassVar``.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
else:

    class _Missing:
        def __repr__(self):
            return "MISSING"

    MISSING = _Missing()

    class _Field:
        __slots__ = ("compare", "default", "default_factory", "name")

        def __init__(self, default, default_factory, compare):
            self.default, self.default_factory, self.compare = default, default_factory, compare

    def field(*, default=MISSING, default_factory=MISSING, compare=True):
        return _Field(default, default_factory, compare)

    def fields(kind):
        return kind.__mis_fields__

    def is_dataclass(value):
        return hasattr(value, "__mis_fields__")

    def replace(value, **changes):
        kept = {name: item for name, item in vars(value).items() if name not in changes}
        return type(value)(**kept, **changes)

    def dataclass(kind=None, /, *, frozen=False, kw_only=False):
        if kind is None:
            return lambda kind: _made(kind, frozen, kw_only)
        return _made(kind, frozen, kw_only)

    def _made(kind, frozen, kw_only):
        found = []
        for name in kind.__annotations__:
            default = kind.__dict__.get(name, MISSING)
            one = default if isinstance(default, _Field) else _Field(default, MISSING, True)
            one.name = name
            if one is default and one.default is MISSING:
                delattr(kind, name)
            elif one is default:
                setattr(kind, name, one.default)
            found.append(one)
        kind.__mis_fields__ = tuple(found)
        kind.__init__ = _init(kind, tuple(found), kw_only)
        kind.__eq__ = _eq
        kind.__hash__ = _hash if frozen else None
        kind._mis_compared = tuple(one.name for one in found if one.compare)
        if "__repr__" not in kind.__dict__:
            kind.__repr__ = _repr
        if frozen:
            kind.__setattr__ = _refuse
            kind.__delattr__ = _refuse
        return kind

    def _init(kind, found, kw_only):
        names = tuple(one.name for one in found)
        known, positional = frozenset(names), 0 if kw_only else len(names)
        needed = frozenset(
            one.name for one in found if one.default is MISSING and one.default_factory is MISSING
        )
        given_by_class = {one.name: one.default for one in found if one.default is not MISSING}
        factories = [
            (one.name, one.default_factory) for one in found if one.default_factory is not MISSING
        ]

        def __init__(self, *args, **named):
            if len(args) > positional:
                most = f"takes {positional} positional arguments but {len(args)} were given"
                raise TypeError(f"{kind.__qualname__}() {most}")
            given = dict(zip(names, args, strict=False)) if args else named
            if args and named:
                if not given.keys().isdisjoint(named):
                    twice = sorted(given.keys() & named)
                    raise TypeError(f"{kind.__qualname__}() got {twice[0]!r} twice")
                given |= named
            if not given.keys() <= known:
                unknown = sorted(given.keys() - known)
                raise TypeError(f"{kind.__qualname__}() has no field {unknown[0]!r}")
            if not needed <= given.keys():
                missing = sorted(needed - given.keys())
                raise TypeError(f"{kind.__qualname__}() misses {', '.join(missing)}")
            values = self.__dict__
            values.update(given_by_class)
            values.update(given)
            for name, make in factories:
                if name not in given:
                    values[name] = make()

        return __init__

    def _compared(value):
        return tuple([value.__dict__[name] for name in value._mis_compared])

    def _eq(self, other):
        if other.__class__ is not self.__class__:
            return NotImplemented
        return _compared(self) == _compared(other)

    def _hash(self):
        return hash(_compared(self))

    def _repr(self):
        told = ", ".join(f"{one.name}={getattr(self, one.name)!r}" for one in fields(self))
        return f"{type(self).__qualname__}({told})"

    def _refuse(self, name, value=None):
        raise AttributeError(f"{type(self).__qualname__} is frozen: {name} stays as it is")


__all__ = ["MISSING", "dataclass", "field", "fields", "is_dataclass", "replace"]
