"""JSON Schema of any draft, by `jsonschema`: nothing is fetched, multiples are exact, unique items take linear time.

A schema without `$schema` is of 2020-12, and its keywords that the drafts 4 and 7 wrote differently mean what they did
there: a list as `items`, `additionalItems`, `dependencies`, `exclusiveMinimum: true`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import Any

from jsonschema import Draft4Validator, Draft7Validator, Draft202012Validator, SchemaError, ValidationError
from jsonschema.validators import create, extend, validator_for
from jsonschema_specifications import REGISTRY
from referencing import Registry, Resource
from referencing.exceptions import Unresolvable
from referencing.jsonschema import specification_with


def validator_of(schema: Any) -> Any:
    """A validator of `jsonschema`.

    Raises:
        ValueError: it is not a schema of the draft that it names, or of any, or `$schema` names none that is known.
    """
    if not isinstance(schema, dict) or "$schema" not in schema:
        fits = _first_that_fits(schema, Draft202012Validator, Draft7Validator, Draft4Validator)
        kind = _of_any_draft(Draft202012Validator if fits is Draft202012Validator else Draft7Validator)
    else:
        draft = validator_for({"$schema": str(schema["$schema"])}, default=None)
        if draft is None:
            known = Draft202012Validator.META_SCHEMA["$id"]
            raise ValueError(f"$schema {schema['$schema']!r} is not a known draft, such as {known}")
        # Else jsonschema would take its own class of the draft again where a $ref leads back to the whole schema.
        schema = {key: value for key, value in schema.items() if key != "$schema"}
        kind = _exact(_first_that_fits(schema, draft))
    return kind(schema, registry=Registry())  # it contains the schemas of the drafts


def _first_that_fits(schema: Any, *drafts: Any) -> Any:
    reasons = []
    for draft in drafts:
        try:
            draft.check_schema(schema)
            return draft
        except SchemaError as error:
            reasons.append(f"{error.message} (at {error.json_path})")
    raise ValueError(f"not a JSON schema: {reasons[0]}")


def check_refs(validator: Any) -> None:
    """Raises ValueError for a `$ref` that leads out of the schema, or to nothing in it."""
    specification = specification_with(validator.META_SCHEMA["$schema"])
    root = specification.create_resource(validator.schema)
    _check_refs(root, REGISTRY.resolver_with_root(root))


def _check_refs(resource: Resource[Any], resolver: Any) -> None:
    contents = resource.contents if isinstance(resource.contents, dict) else {}
    for key in ("$ref", "$dynamicRef", "$recursiveRef"):
        if isinstance(ref := contents.get(key), str):
            try:
                resolver.lookup(ref)
            except (Unresolvable, ValueError) as error:
                raise ValueError(f"{key} {ref!r} leads to nothing in the schema, and nothing is fetched") from error
    for inner in resource.subresources():
        _check_refs(inner, resolver.in_subresource(inner))


# ── keywords ──


@functools.cache
def _exact(draft: Any) -> Any:
    checks = {"multipleOf": _multiple_of, "divisibleBy": _multiple_of, "uniqueItems": _unique_items}
    return extend(draft, {name: check for name, check in checks.items() if name in draft.VALIDATORS})


@functools.cache
def _of_any_draft(draft: Any) -> Any:
    """The keywords of 2020-12 and those of older drafts that a newer one changed. draft: where schemas may stand."""
    checks = dict(_exact(Draft202012Validator).VALIDATORS)
    checks["dependencies"] = Draft7Validator.VALIDATORS["dependencies"]
    for name in ("items", "additionalItems"):
        checks[name] = _where("items", list, Draft7Validator, name)
    for end in ("Minimum", "Maximum"):
        for name in (end.lower(), f"exclusive{end}"):
            checks[name] = _where(f"exclusive{end}", bool, Draft4Validator, name)
    return create(draft.META_SCHEMA, checks, type_checker=Draft202012Validator.TYPE_CHECKER)


def _where(key: str, kind: type, old: Any, name: str) -> Callable[..., Iterable[Any]]:
    """The check of keyword `name` of the draft `old` in a schema whose `key` is of this kind, else of 2020-12."""

    def check(validator: Any, value: Any, instance: Any, schema: dict[str, Any]) -> Iterable[Any]:
        draft = old if isinstance(schema.get(key), kind) else Draft202012Validator
        known = draft.VALIDATORS.get(name)
        return known(validator, value, instance, schema) or () if known else ()

    return check


def _multiple_of(validator: Any, unit: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    """In decimal numbers as they are written: 19.99 is a multiple of 0.01."""
    if validator.is_type(instance, "number") and (_fraction(instance) / _fraction(unit)).denominator != 1:
        yield ValidationError(f"{instance!r} is not a multiple of {unit}")


def _fraction(number: int | float) -> Fraction:
    return Fraction(number) if isinstance(number, int) else Fraction(repr(number))


def _unique_items(validator: Any, wanted: bool, instance: Any, schema: Any) -> Iterator[ValidationError]:
    """The library compares each item with each where they cannot be sorted."""
    if wanted and validator.is_type(instance, "array"):
        items = [json.dumps(_plain(item), sort_keys=True) for item in instance]
        if len(set(items)) < len(items):
            yield ValidationError(f"{instance!r} has non-unique elements")


def _plain(value: Any) -> Any:
    """With integers for numbers that are, so that 1.0 is 1."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return {key: _plain(part) for key, part in value.items()} if isinstance(value, dict) else value
