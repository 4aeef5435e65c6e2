"""Bodies that a route reads itself: FastAPI parses them on the loop, before the route says who may send them."""

from typing import Any, TypeVar

import msgspec
from pydantic import BaseModel, ValidationError

from app.errors import InvalidRequest, invalid_field
from app.routes.errors import invalid_fields

T = TypeVar("T")
Model = TypeVar("Model", bound=BaseModel)


def read_as(model: type[Model], body: bytes) -> Model:
    """Read JSON as a pydantic model; raises InvalidRequest about the first field that is wrong.

    It is msgspec that parses: pydantic keeps the interpreter's lock for ten times as long, and takes gigabytes where a
    body is all numbers.
    """
    given: Any = decode_as(object, body)
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise invalid_fields(error.errors(include_url=False, include_input=False)) from None


def decode_as(kind: type[T], body: bytes) -> T:
    """Read JSON as a type of msgspec's, which is quicker; raises InvalidRequest about the first field that is wrong."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise invalid_field(error) from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.") from None
