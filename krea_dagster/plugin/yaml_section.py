"""A section of a component's YAML: any value may be a template, and errors name their key."""

import re
from collections.abc import Mapping
from functools import partial
from types import UnionType
from typing import Annotated, Any, Final, Union, get_args, get_origin

import dagster as dg
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic.fields import FieldInfo
from typing_extensions import Self

from krea_dagster import redact

#: What is a template and not the value itself.
TEMPLATE: Final = r"\{\{|\{%"
_Template = Annotated[str, Field(pattern=TEMPLATE)]

#: The models that read the YAML, by the class of their section.
_models: Final[dict[type, type[BaseModel]]] = {}


class YamlSection(dg.Model, dg.Resolvable):
    """A section of the YAML whose errors are reported at their own line, at any depth.

    Dagster reads a template such as ``{{ env.NAME }}`` as text, applies a number's limits to that
    text, and accepts any text for any value. Here a value is its type or a template, and its limits
    apply to what the template gives.
    """

    #: A template of digits gives a number, also where a text is wanted.
    model_config = ConfigDict(coerce_numbers_to_str=True)

    @classmethod
    def model(cls) -> type[BaseModel]:
        """Return the model that reads the YAML."""
        if cls not in _models:
            derived = super().model()
            fields: dict[str, Any] = {
                name: (
                    _or_template(field.annotation, cls.model_fields[name]),
                    _plain(field, cls.model_fields[name].description),
                )
                for name, field in derived.model_fields.items()
            }
            made = create_model(derived.__name__, __base__=dg.Model, **fields)
            extra = derived.model_config.get("json_schema_extra")
            shown = extra if isinstance(extra, dict) else {}
            made.model_config["json_schema_extra"] = partial(_go_into_sections, shown)
            made.model_rebuild(force=True)
            _models[cls] = made
        return _models[cls]

    @classmethod
    def resolve_from_model(cls, context: dg.ResolutionContext, model: BaseModel) -> Self:
        """Render the templates, and check the values. An error names the key and its line."""
        for name in model.model_fields_set:
            text, at = getattr(model, name), context.at_path(name)
            is_template = isinstance(text, str) and re.search(TEMPLATE, text)
            if is_template and at.resolve_value(text, as_type=object) is None:
                # A limit that is silently missing would be no limit.
                why = (
                    f"{name} is {text}, which gives no value: is its variable set? "
                    f"env('NAME', 'DEFAULT') has a default.\n"
                )
                raise at.build_resolve_fn_exc([why], field_name=name, model=model)
        try:
            resolved: Self = super().resolve_from_model(context, model)
        except ValidationError as error:
            first = error.errors()[0]
            at = context
            for part in first["loc"]:
                at = at.at_path(part)
            name = ".".join(map(str, first["loc"]))
            text = f"{name} is {redact.text(repr(first['input']))}: {first['msg']}\n"
            raise at.build_resolve_fn_exc([text], field_name=name, model=model) from None
        return resolved


def _or_template(annotation: Any, own: FieldInfo) -> Any:
    """Return the type of a field in the YAML: its own, or a template.

    Dagster's type is the field's own, with its limits, or any text.
    """
    arms = _arms(annotation)
    takes_text = str in _arms(own.annotation) and not _is_limited_text(own)
    kept = [_items_or_template(arm) for arm in arms if takes_text or arm is not str]
    return Union[tuple(kept if takes_text else [*kept, _Template])]  # noqa: UP007 - made at run time


def _arms(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _is_limited_text(field: FieldInfo) -> bool:
    return field.annotation is str and bool(field.metadata)


def _items_or_template(annotation: Any) -> Any:
    """Return the type of a mapping of numbers whose numbers may be templates; others unchanged."""
    if get_origin(annotation) is dict and get_args(annotation)[1] in (int, float, bool):
        return dict[str, get_args(annotation)[1] | _Template]  # type: ignore[misc]  # made at run time
    return annotation


def _plain(field: FieldInfo, description: str | None) -> FieldInfo:
    """Return a field without limits: those of its type are in the type."""
    made: FieldInfo = Field(
        default=field.default,
        description=description,
        examples=field.examples,
        json_schema_extra=field.json_schema_extra,
    )
    return made


def _go_into_sections(extra: Mapping[str, Any], schema: dict[str, Any]) -> None:
    """Accept any section in ``anyOf``, and describe its content by ``if`` and ``then``.

    For a section with one misspelt line, ``dg check yaml`` would otherwise report all of it.
    """
    schema.update(extra)
    for field in schema["properties"].values():
        sections = [option for option in field.get("anyOf", ()) if "$ref" in option]
        if len(sections) == 1:
            field["anyOf"].append({"type": "object"})
            field |= {"if": {"type": "object"}, "then": sections[0]}
