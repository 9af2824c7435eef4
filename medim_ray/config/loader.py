"""One way from YAML and dotted overrides to typed, frozen configs, for the command line, sweep points and ablations.

Layers are merged as plain trees (parent by `inherits:`, file, overrides), keys are checked against the dataclasses,
OmegaConf converts and resolves the values, and the dataclasses are built last, so that `__post_init__` always runs.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

C = TypeVar("C")


class _Yaml(yaml.SafeLoader):
    """Scalars as in YAML 1.2: only true and false are booleans (`on` is a key of ours) and 1e-4 is a number; 007,
    1_000, 1:30 and 2026-11-22 are text. A key that stands twice in one mapping is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Yaml.yaml_implicit_resolvers = {
    first: [
        (tag, regexp)
        for tag, regexp in resolvers
        if tag.rpartition(":")[2] not in ("bool", "float", "int", "timestamp")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Yaml.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))
_Yaml.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?$|[-+]?[0-9]+[eE][-+]?[0-9]+$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text, by the rules of YAML 1.2."""
    return yaml.load(text, Loader=_Yaml)


def component(registry: Any, default: str, meaning: str, **metadata: Any) -> Any:
    """A dataclass field that holds the `Config` of one class of `registry`, chosen by its key `name`."""
    meta = {"registry": registry, "default_name": default, "help": meaning, **metadata}
    return dataclasses.field(default_factory=lambda: registry[default].Config(name=default), metadata=meta)


def option(default: Any, meaning: str, *, hashed: bool = True, fixed: bool = True) -> Any:
    """A dataclass field with its meaning.

    hashed: the value is part of run_hash (what the result is a function of).
    fixed: the value may not change when a run is resumed.
    """
    meta = {"help": meaning, "hashed": hashed, "fixed": fixed}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=meta)
    return dataclasses.field(default=default, metadata=meta)


def load(root: type[C], file: str | Path | None = None, overrides: Sequence[str] = ()) -> C:
    """A `root` object from `file` (with its parents) and `key.sub=value` overrides.

    Raises ValueError that names the key, the file or override it came from, and the nearest known key.
    """
    tree: dict[str, Any] = {}
    if file is not None:
        for path, layer in _layers(Path(file), seen=()):
            tree = _merge(root, tree, layer, where=str(path))
    if overrides:
        tree = _merge(root, tree, _parse_overrides(overrides), where="the command line")
    sources = [str(file)] * (file is not None) + ["the command line"] * bool(overrides)
    return from_tree(root, tree, where=" and ".join(sources) or "the defaults")


def read_tree(file: str | Path) -> dict[str, Any]:
    """The plain tree of a file with its parents merged in, keys unchecked."""
    merged = OmegaConf.merge(*(OmegaConf.create(layer) for _, layer in _layers(Path(file), seen=())))
    tree = OmegaConf.to_container(merged)
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def from_tree(root: type[C], tree: Mapping[str, Any], where: str = "config") -> C:
    """A `root` object from a plain tree such as `to_tree` returns."""
    tree = _merge(root, {}, tree, where=where)
    try:
        schema = OmegaConf.create(_defaults(root, tree), flags={"allow_objects": True})
        values = OmegaConf.to_container(OmegaConf.merge(schema, OmegaConf.create(dict(tree))), resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{where}: {error}") from None
    assert isinstance(values, dict)
    return _build(root, values, prefix="", where=where)


def to_tree(config: Any) -> dict[str, Any]:
    """The plain tree of a config object: dicts, lists and scalars, ready for YAML or JSON."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return value

    tree = plain(config)
    assert isinstance(tree, dict)
    return tree


def to_yaml(config: Any, hide_secrets: bool = False) -> str:
    """The resolved tree as YAML, in the order of the schema; fields marked `secret` as *** where they are hidden."""
    tree = to_tree(config)
    for key, value, meta in leaves(config):
        if hide_secrets and meta.get("secret") and value:
            *groups, leaf = key.split(".")
            reduce(dict.__getitem__, groups, tree)[leaf] = "***"
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def run_hash(config: Any) -> str:
    """Twelve hexadecimal digits over every value that the result is a function of (fields marked `hashed`)."""
    values = {key: value for key, value, meta in leaves(config) if meta.get("hashed", True)}
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=6).hexdigest()


def leaves(config: Any, prefix: str = "", inherited: Mapping[str, Any] | None = None) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, plain value, metadata) of every leaf; a group marked hashed=False passes that on to its leaves."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        meta = {**f.metadata, **(inherited or {})}
        if dataclasses.is_dataclass(value):
            passed = {k: v for k, v in meta.items() if k in ("hashed", "fixed") and v is False}
            yield from leaves(value, f"{prefix}{f.name}.", passed)
        else:
            yield f"{prefix}{f.name}", list(value) if isinstance(value, tuple) else value, meta


def describe(root: type[Any]) -> Iterator[tuple[str, str, Any, str]]:
    """(dotted key, type, default, meaning) of every option; components list the options of each registered class."""
    yield from _describe(root, "")


def _describe(cls: type[Any], prefix: str) -> Iterator[tuple[str, str, Any, str]]:
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        key, help_text = f"{prefix}{f.name}", f.metadata.get("help", "")
        registry = f.metadata.get("registry")
        if registry is not None:
            yield f"{key}.name", " | ".join(registry), f.metadata["default_name"], help_text
            classes: dict[type[Any], list[str]] = {}
            for name in registry:
                classes.setdefault(registry[name].Config, []).append(name)
            for config_class, names in classes.items():
                for k, t, d, h in _describe(config_class, f"{key}."):
                    if k != f"{key}.name":
                        yield f"{k} [{'|'.join(names)}]", t, d, h
        elif dataclasses.is_dataclass(hints[f.name]):
            yield from _describe(typing.cast(type[Any], hints[f.name]), f"{key}.")
        else:
            default = f.default if f.default is not dataclasses.MISSING else None
            if default is None and f.default_factory is not dataclasses.MISSING:
                default = f.default_factory()
            yield key, _type_name(hints[f.name]), default, help_text


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def _layers(path: Path, seen: tuple[Path, ...]) -> list[tuple[Path, dict[str, Any]]]:
    """The file's parents first, then the file; each a plain tree without its `inherits` key."""
    path = path.resolve()
    if path in seen:
        raise ValueError(f"{path}: `inherits` runs in a circle: {' -> '.join(p.name for p in (*seen, path))}")
    if path.is_dir():
        raise ValueError(f"config file {path} is a folder. Give --config the path of a YAML file in it")
    if not path.is_file():
        raise ValueError(f"config file {path} does not exist. Give --config the path of a YAML file, see configs/")
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is no text in UTF-8: convert it, e.g. by `iconv -f LATIN1 -t UTF-8`") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: a config is a mapping of keys to values, this is a {type(tree).__name__}")
    parent = tree.pop("inherits", None)
    if parent is not None and not isinstance(parent, str):
        raise ValueError(f"{path}: inherits={parent!r}: one parent, the path of a YAML file from this folder")
    above = _layers(path.parent / parent, (*seen, path)) if parent is not None else []
    return [*above, (path, tree)]


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for text in overrides:
        key, equals, raw = text.partition("=")
        if not equals or not key:
            raise ValueError(f"override {text!r} is not of the form key.sub=value")
        try:
            value = parse_yaml(raw) if raw.strip() else ""
        except yaml.YAMLError:
            value = raw
        node = tree
        *groups, leaf = key.split(".")
        for group in groups:
            if isinstance(node.get(group), str):  # masking=block masking.ratio=0.5
                node[group] = {"name": node[group]}
            node = node.setdefault(group, {})
            if not isinstance(node, dict):
                raise ValueError(f"override {text!r}: {group!r} was given as a value before")
        node[leaf] = value
    return tree


def _merge(cls: type[Any], base: Mapping[str, Any], layer: Mapping[str, Any], where: str, prefix: str = "") -> Any:
    """`layer` over `base`, keys checked against `cls`. A component whose name changes loses the old class's keys."""
    merged = dict(base)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key, value in layer.items():
        if key not in fields:
            raise ValueError(_unknown(f"{prefix}{key}", cls, prefix, where))
        f = fields[key]
        registry = f.metadata.get("registry")
        group: Any = hints[key] if dataclasses.is_dataclass(hints[key]) else None
        if registry is not None or group is not None:
            if isinstance(value, str) and registry is not None:
                value = {"name": value}
            if not isinstance(value, Mapping):
                raise ValueError(f"{where}: {prefix}{key} is a group of options, not the value {value!r}")
            old = merged.get(key, {})
            if registry is not None:
                name = value.get("name", old.get("name", f.metadata["default_name"]))
                if name != old.get("name", f.metadata["default_name"]):
                    old = {}
                try:
                    group = registry[name].Config
                except ValueError as error:
                    raise ValueError(f"{where}: {prefix}{key}.name: {error}") from None
                old = {**old, "name": name}
            value = _merge(group, old, value, where, f"{prefix}{key}.")
        merged[key] = value
    return merged


def _unknown(key: str, cls: type[Any], prefix: str, where: str) -> str:
    known = [k.split(" ")[0] for k, *_ in _describe(cls, prefix)]
    known += [f"{prefix}{f.name}" for f in dataclasses.fields(cls)]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else f" Known here: {', '.join(sorted(set(known)))}"
    return f"{where}: unknown key {key!r}.{hint}"


def _group_class(f: dataclasses.Field[Any], hint: Any, node: Mapping[str, Any]) -> type[Any] | None:
    """The dataclass behind a field (a plain group, or the chosen class of a component), None for a leaf."""
    registry = f.metadata.get("registry")
    if registry is not None:
        return typing.cast(type[Any], registry[node.get("name", f.metadata["default_name"])].Config)
    return hint if dataclasses.is_dataclass(hint) else None  # type: ignore[return-value]


def _defaults(cls: type[Any], tree: Mapping[str, Any]) -> dict[str, Any]:
    """Plain tree of default values of `cls`, with the component classes that `tree` chooses."""
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        node = tree.get(f.name) or {}
        group = _group_class(f, hints[f.name], node if isinstance(node, Mapping) else {})
        if group is not None:
            values[f.name] = _defaults(group, node)
        elif f.default is not dataclasses.MISSING:
            values[f.name] = list(f.default) if isinstance(f.default, tuple) else f.default
        elif f.default_factory is not dataclasses.MISSING:
            value = f.default_factory()
            values[f.name] = list(value) if isinstance(value, tuple) else value
    return values


def _build(cls: type[C], values: Mapping[str, Any], prefix: str, where: str) -> C:
    hints = typing.get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        key = f"{prefix}{f.name}"
        if f.name not in values:
            raise ValueError(f"{where}: {key} has no default: give it as {key}=VALUE or in the YAML file")
        value = values[f.name]
        group = _group_class(f, hints[f.name], value if isinstance(value, Mapping) else {})
        if group is not None:
            arguments[f.name] = _build(group, value, f"{key}.", where)
        else:
            arguments[f.name] = _convert(value, hints[f.name], key, where)
    try:
        return cls(**arguments)
    except ValueError as error:
        where_from = "" if not prefix or str(error).startswith(prefix) else f"{prefix[:-1]}: "
        raise ValueError(f"{where}: {where_from}{error}") from None


def _convert(value: Any, hint: Any, key: str, where: str) -> Any:
    """`value` as the annotated type: int to float, list to tuple, and an error that names the key otherwise."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        for arm in (a for a in args if a is not type(None)):
            try:
                return _convert(value, arm, key, where)
            except ValueError:
                continue
    elif origin is typing.Literal:
        if value in args:
            return value
        raise ValueError(f"{where}: {key}={value!r} is not one of {', '.join(map(repr, args))}")
    elif origin in (tuple, list) and isinstance(value, list | tuple):
        if origin is tuple and args and args[-1] is not Ellipsis:
            if len(args) == len(value):
                return tuple(
                    _convert(v, a, f"{key}[{i}]", where) for i, (v, a) in enumerate(zip(value, args, strict=True))
                )
        else:
            return origin(_convert(v, args[0], f"{key}[{i}]", where) for i, v in enumerate(value))
    elif origin is dict and isinstance(value, Mapping):
        return {str(k): _convert(v, args[1], f"{key}.{k}", where) for k, v in value.items()}
    elif hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    elif isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise ValueError(f"{where}: {key}={value!r} is not of type {_type_name(hint)}")
