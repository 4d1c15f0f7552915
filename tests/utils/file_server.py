"""A server of one file on this machine, for tests of downloads."""

import http.server


class Server(http.server.ThreadingHTTPServer):
    """Serves one file; `cut` answers are stopped half way, ranges are taken where `ranges`.

    `version`: the headers that tell the file from a later one, such as {"ETag": '"1"'}.
    """

    def __init__(self, data: bytes, path: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.data, self.path, self.cut, self.ranges, self.asked = data, path, 0, True, []
        self.version: dict[str, str] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{self.path}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        if self.path != f"/{self.server.path}":
            self.send_error(404)
            return
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        first = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        wanted, version = self.headers.get("If-Range"), self.server.version
        first = first if self.server.ranges and wanted in (None, *version.values()) else 0
        rest = self.server.data[first:]
        if first and not rest:
            self.send_error(416)
            return
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(rest)))
        for header in version.items():
            self.send_header(*header)
        self.end_headers()
        if self.server.cut:
            self.server.cut -= 1
            rest = rest[: len(rest) // 2]
        self.wfile.write(rest)

    def log_message(self, *args: object) -> None:
        pass
