"""A web server of this process's own, with ranges, that can be slow, cut off answers, or be without ranges."""

import re
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


@dataclass
class Served:
    """What is served, how, and what was asked for."""

    files: dict[str, bytes]
    ranges: bool = True
    cut_after: int | None = None  # bytes of an answer's body, once for each entry of `cuts`
    cuts: int = 0
    pause: float = 0.0  # seconds after each 64 KiB
    states: list[int] = field(default_factory=list)  # answer with these first
    headers: dict[str, str] = field(default_factory=dict)  # of every answer
    asked: list[tuple[str, int]] = field(default_factory=list)  # path and where it was to begin
    url: str = ""


def _handler(served):
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            name = self.path.partition("?")[0].lstrip("/")
            found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            first = int(found.group(1)) if found and served.ranges else 0
            served.asked.append((name, first))
            if served.states:
                return self.send_error(served.states.pop(0))
            content = served.files.get(name)
            if content is None:
                return self.send_error(404)
            if first >= len(content) and found:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.end_headers()
                return None
            body = content[first:]
            self.send_response(206 if found and served.ranges else 200)
            self.send_header("Content-Length", str(len(body)))
            for header, value in served.headers.items():
                self.send_header(header, value)
            if found and served.ranges:
                self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            if self.command == "HEAD":
                return None
            if served.cuts > 0:
                served.cuts -= 1
                body = body[: served.cut_after]
            try:
                for start in range(0, len(body), 1 << 16):
                    self.wfile.write(body[start : start + (1 << 16)])
                    time.sleep(served.pause)
            except (BrokenPipeError, ConnectionResetError):
                pass
            return None

        do_HEAD = do_GET  # noqa: N815 - as the module calls it

    return Handler


@contextmanager
def serving(files, **how):
    """Serve files by name on 127.0.0.1 while the block lasts."""
    served = Served(files, **how)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(served))
    server.daemon_threads = True
    served.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
