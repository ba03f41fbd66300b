"""What is served to this machine alone stays so: a website that a browser has open can point a name of its own at 127.0.0.1 (DNS
rebinding), and would then read and ask as a page of ours does. Its requests come under its own name.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from .json_text import json_text

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

HERE = re.compile(r"(?:127\.0\.0\.1|localhost|\[::1\])(?::[0-9]{1,5})?", re.IGNORECASE)
MISDIRECTED = 421


class LocalOnly:
    """ASGI middleware: refuses requests whose `Host` is no name of this machine. One without is no browser's, and passes."""

    def __init__(self, app: App):
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        hosts = [value.decode("latin-1") for name, value in scope.get("headers", ()) if name == b"host"]
        if scope["type"] not in ("http", "websocket") or all(map(HERE.fullmatch, hosts)):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # policy violation
        else:
            detail = f"{hosts[0][:100]!r} is no name of this machine, to which alone this is served; ask for localhost"
            content = json_text({"detail": detail}).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
            await send({"type": "http.response.start", "status": MISDIRECTED, "headers": headers})
            await send({"type": "http.response.body", "body": content})
