"""Answer only this machine's own pages and programs, not web sites whose name points here."""

import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
WsgiApp = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]
_HOST = re.compile(r"(127\.0\.0\.1|localhost)(:\d{1,5})?", re.IGNORECASE)
_REFUSAL = b'{"detail":"the request comes from another site: open the page itself"}'
_KIND = {"content-type": "application/json", "content-length": str(len(_REFUSAL))}
_HEADERS = {
    "cross-origin-resource-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def is_own_request(hosts: Sequence[str], origins: Sequence[str]) -> bool:
    """Whether a request with these Host and Origin headers was made by our own page or program."""
    own = len(hosts) == 1 and _HOST.fullmatch(hosts[0])
    return bool(own) and list(origins) in ([], [f"http://{hosts[0]}"])


def guarded(app: App, headers: dict[str, str]) -> App:
    """Wrap an ASGI application: 403 for a foreign Host or Origin, and more headers in answers."""
    added = [(k.encode(), v.encode()) for k, v in (_HEADERS | headers).items()]
    kind = [(k.encode(), v.encode()) for k, v in _KIND.items()]

    async def guard(scope: Message, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *added]
            await send(message)

        given = [(name, value.decode("latin-1")) for name, value in scope["headers"]]
        hosts, origins = ([v for k, v in given if k == name] for name in (b"host", b"origin"))
        if is_own_request(hosts, origins):
            await app(scope, receive, send_with_headers)
        else:
            await send({"type": "http.response.start", "status": 403, "headers": kind})
            await send({"type": "http.response.body", "body": _REFUSAL})

    return guard


def guarded_wsgi(app: WsgiApp) -> WsgiApp:
    """Wrap a WSGI application: 403 for a foreign Host or Origin."""

    def guard(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        given = ([environ[key]] if key in environ else [] for key in ("HTTP_HOST", "HTTP_ORIGIN"))
        if is_own_request(
            *given
        ):  # headers that were sent twice come joined by commas, and do not match
            return app(environ, start_response)
        start_response("403 Forbidden", list(_KIND.items()))
        return [_REFUSAL]

    return guard
