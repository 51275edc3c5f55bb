"""Who may ask: keys, hosts, origins, and how much may be sent. What passes knows its owner, `request.state.owner`."""

import asyncio
import base64
import binascii
import hashlib
import hmac
from collections.abc import Collection, Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flashi2v_data.console import one_line

_UPLOAD_SECONDS = 60
_OPEN_PATHS = ("/health",)
# Gradio's scripts are inline and compile functions; nothing at all comes from, goes to, or is framed by another host.
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
        "style-src 'self' 'unsafe-inline'; frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def fault(status: int, message: str, *, code: str | None = None, param: str | None = None) -> JSONResponse:
    """Return an error as OpenAI's clients read it."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    headers = {"WWW-Authenticate": 'Basic realm="flashi2v, any name and the key"'} if status == 401 else {}
    if status == 429:
        headers["Retry-After"] = "10"
    error = {"message": one_line(message), "type": kind, "param": param, "code": code}
    return JSONResponse({"error": error}, status, headers)


class Keys:
    """The keys that open the server; without any it is open, and everybody is the same owner.

    Args:
        keys: the secrets, of which only hashes are kept.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def owner(self, authorization: str) -> str | None:
        """Return whose a key is; None where there is no such key. Its time does not depend on the keys.

        Args:
            authorization: `Bearer KEY`, or `Basic` with any name and the key as password, which browsers ask for.
        """
        if not self._digests:
            return ""
        scheme, _, given = authorization.partition(" ")
        if scheme.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                given = ""
        digest = _digest(given.strip())
        matches = [known for known in self._digests if hmac.compare_digest(digest, known)]
        return matches[0].hex()[:32] if matches and scheme.lower() in ("basic", "bearer") else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


class Gate:
    """The outermost middleware.

    Args:
        app: what is behind it.
        keys: who may ask.
        max_bytes: of a request's body.
        hosts: names that the server may be called by; None are all. A page of a stranger that has a name of its own
            lead to this machine cannot ask by it.
    """

    def __init__(self, app: ASGIApp, keys: Keys, max_bytes: int, hosts: Collection[str] | None) -> None:
        self._app, self._keys, self._max_bytes, self._hosts = app, keys, max_bytes, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what may not pass; hand on the rest, with a bounded body."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":  # nothing here speaks by websockets
            return await send({"type": "websocket.close", "code": 1008})
        refusal = self._refusal(scope)
        if refusal is not None:
            return await refusal(scope, receive, send)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, _bounded(receive, self._max_bytes), send_with_headers)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self._hosts is not None and _name(host) not in self._hosts:
            return fault(403, f"this server does not go by the name {host!r}: --allow-host lets it", code="host")
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        is_elsewhere = origin is not None and urlsplit(origin).netloc.lower() != host.lower()
        if is_elsewhere or (site not in ("none", "same-origin") and headers.get("sec-fetch-mode") != "navigate"):
            return fault(403, "requests of other sites' pages are refused", code="cross_origin")
        owner = self._keys.owner(headers.get("authorization", ""))
        if owner is None and scope["path"] not in _OPEN_PATHS:
            return fault(401, "a key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        if (length := headers.get("content-length", "0")).isdecimal() and int(length[:20]) > self._max_bytes:
            return fault(413, f"a request may have {self._max_bytes:,} bytes", code="too_large")
        scope.setdefault("state", {})["owner"] = owner
        return None


def _name(host: str) -> str:
    """Return a host without its port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _bounded(receive: Receive, max_bytes: int) -> Receive:
    """Return a body that ends with an error where it is too large, or takes too long to arrive."""
    loop = asyncio.get_running_loop()
    left, deadline, is_whole = max_bytes, loop.time() + _UPLOAD_SECONDS, False

    async def next_part() -> Message:
        nonlocal left, is_whole
        if is_whole:
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), deadline - loop.time())
        except asyncio.TimeoutError:
            raise HTTPException(408, f"a request must arrive within {_UPLOAD_SECONDS} s") from None
        left -= len(message.get("body", b""))
        is_whole = not message.get("more_body", False)
        if left < 0:
            raise HTTPException(413, f"a request may have {max_bytes:,} bytes")
        return message

    return next_part
