"""A local HTTP server that lists and serves the files of repositories as the hub does to `huggingface_hub`."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """Use as a context manager; `url` is what `HF_ENDPOINT` takes.

    Args:
        repositories: the folder of each by its id.
    """

    def __init__(self, repositories):
        self.repositories, self.downloaded = repositories, []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments):
                pass

            def do_HEAD(self):
                self.answer(*server.find(unquote(urlsplit(self.path).path)))

            def do_GET(self):
                path = unquote(urlsplit(self.path).path)
                if "/resolve/" in path:
                    server.downloaded.append(path.partition("/resolve/main/")[2])
                self.answer(*server.find(path))

            def answer(self, status, body):
                self.send_response(status)
                headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
                if status == 404:
                    headers = {"X-Error-Code": "EntryNotFound"}
                for name, value in {**headers, "Content-Length": len(body)}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def find(self, path):
        """Status and body of a path: a repository's tree as JSON, or a file of it."""
        for name, folder in self.repositories.items():
            if path == f"/api/models/{name}/tree/main":
                files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
                sizes = {str(file.relative_to(folder)): file.stat().st_size for file in files}
                entry = {"type": "file", "oid": "0" * 40}
                return 200, json.dumps([{**entry, "path": name, "size": sizes[name]} for name in sizes]).encode()
            file = folder / path.removeprefix(f"/{name}/resolve/main/").lstrip("/")
            if path.startswith(f"/{name}/resolve/main/") and file.is_file():
                return 200, file.read_bytes()
        return 404, b""

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._server.server_close()
