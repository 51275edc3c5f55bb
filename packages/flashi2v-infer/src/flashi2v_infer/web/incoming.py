"""What a request asks for, read from JSON or from a form, with its picture."""

import base64
import binascii
import json
from typing import Any
from urllib.parse import urlsplit

import anyio
import httpx
from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from flashi2v_data.errors import InputError
from flashi2v_data.schema_faults import fault_lines
from flashi2v_infer.web.schema import ImageUrl, Order
from flashi2v_infer.web.service import Service

_FETCH_SECONDS = 20


def order_schema() -> dict[str, Any]:
    """Return what a request's body may be, in both of its forms."""
    schema = Order.model_json_schema()
    schema.pop("$defs")
    of_url = {**ImageUrl.model_json_schema(), "description": ImageUrl.__doc__}
    schema["required"] = ["prompt", "input_reference"]
    forms = {
        "application/json": {**schema, "properties": {**schema["properties"], "input_reference": of_url}},
        "multipart/form-data": {
            **schema,
            "properties": {**schema["properties"], "input_reference": {"type": "string", "format": "binary"}},
        },
    }
    return {"requestBody": {"required": True, "content": {kind: {"schema": form} for kind, form in forms.items()}}}


async def read(request: Request) -> tuple[Order, bytes | None]:
    """Read an order and its picture from JSON, or from a form.

    Raises:
        InputError: naming the field.
    """
    image = None
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() == "multipart/form-data":
        values: dict[str, Any] = {}
        async with request.form(max_files=1, max_fields=64, max_part_size=2**27) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    if name != "input_reference":
                        raise InputError(f"{name}: is no file; input_reference is")
                    image = await value.read()
                elif name == "input_reference[image_url]":
                    values["input_reference"] = {"image_url": value}
                elif name in ("lora", "lora[]"):
                    values.setdefault("lora", []).append(value)
                elif name in values:
                    raise InputError(f"{name}: is given twice")
                else:
                    values[name] = value
    else:
        try:
            values = json.loads(await request.body())
        except (ValueError, RecursionError):
            raise InputError("body: must be JSON, or a form (multipart/form-data)") from None
    try:
        return Order.model_validate(values), image
    except ValidationError as error:
        name, reason = fault_lines(error, Order)[0]
        raise InputError(f"{name or 'body'}: {reason}") from None


async def from_url(url: str, service: Service) -> bytes:
    """Return the picture of a data: URL, or of a host that is allowed.

    Raises:
        InputError: it is neither, or cannot be had.
    """
    head, comma, data = url.partition(",")
    if head.startswith("data:") and comma and head.endswith(";base64"):
        try:
            return base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError):
            raise InputError("input_reference: the data: URL is not base64") from None
    try:
        parts = urlsplit(url)
        is_allowed = parts.scheme in ("http", "https") and parts.hostname in service.url_hosts
    except ValueError:
        is_allowed = False
    if not is_allowed:
        raise InputError(
            "input_reference: send the file, or data:...;base64,...; this server fetches from no such host"
        )
    limit, contents = service.served.limits.max_upload_mib * 2**20, b""
    try:
        # A redirection may lead anywhere, so none is followed.
        with anyio.fail_after(_FETCH_SECONDS):
            client = httpx.AsyncClient(follow_redirects=False, trust_env=False)
            async with client, client.stream("GET", url) as response:
                if response.status_code != 200:
                    raise InputError(f"input_reference: {parts.hostname} answered {response.status_code}")
                async for part in response.aiter_raw():
                    contents += part
                    if len(contents) > limit:
                        raise InputError(f"input_reference: it has more than {limit:,} bytes")
    except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
        raise InputError(f"input_reference: cannot be fetched: {error or type(error).__name__}") from None
    return contents
