"""A stand-in of the Hub's HTTP interface on 127.0.0.1: what creating a repository, committing to it and reading from it take. Repositories live in memory."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """`with Hub() as hub:` serves at `hub.url`; `hub.files["owner/name"]` maps path to bytes, `hub.private` holds the names of private repositories."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.objects: dict[str, bytes] = {}  # large files by SHA-256
        self.commits = 0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self, code: int, content: bytes = b"{}", **headers: str) -> None:
                self.send_response(code)
                for name, value in {"Content-Length": str(len(content)), "Content-Type": "application/json", **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def handle_request(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                path = self.path.partition("?")[0]
                for pattern, call in hub.routes.items():
                    if match := re.fullmatch(pattern, f"{self.command} {path}"):
                        call(self, body, *match.groups())
                        return
                self.answer(404, json.dumps({"error": f"the stand-in has no {self.command} {path}"}).encode())

            do_GET = do_POST = do_PUT = do_HEAD = handle_request  # noqa: N815

            def log_message(self, *args: Any) -> None:
                pass

        repo = r"([\w.-]+/[\w.-]+)"
        self.routes = {
            rf"GET /api/models/{repo}(?:/revision/[^/]+)?": self.info,
            r"POST /api/repos/create": self.create,
            r"POST /api/validate-yaml": self.validate,
            rf"POST /api/models/{repo}/preupload/main": self.preupload,
            rf"POST /{repo}\.git/info/lfs/objects/batch": self.batch,
            r"PUT /objects/(\w+)": self.upload,
            rf"POST /api/models/{repo}/commit/main": self.commit,
            rf"POST /api/models/{repo}/paths-info/[^/]+": self.paths,
            rf"GET /api/models/{repo}/tree/[^/]+": self.tree,
            rf"(?:GET|HEAD) /{repo}/resolve/[^/]+/(.+)": self.resolve,
        }
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def missing(self, request: Any, repo: str) -> bool:
        if repo in self.files:
            return False
        request.answer(404, b'{"error": "Repository not found"}', X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        return True

    def info(self, request: Any, body: bytes, repo: str) -> None:
        if not self.missing(request, repo):
            siblings = [{"rfilename": name} for name in self.files[repo]]
            entry = {"_id": "0", "id": repo, "sha": self.sha, "private": repo in self.private, "siblings": siblings, "tags": []}
            request.answer(200, json.dumps(entry).encode())

    @property
    def sha(self) -> str:
        return f"{self.commits:040x}"

    def create(self, request: Any, body: bytes) -> None:
        data = json.loads(body)
        repo = f"{data['organization']}/{data['name']}"
        self.files.setdefault(repo, {".gitattributes": b"*.safetensors filter=lfs\n"})
        if data.get("private") or data.get("visibility") == "private":
            self.private.add(repo)
        request.answer(200, json.dumps({"url": f"{self.url}/{repo}", "name": repo}).encode())

    def validate(self, request: Any, body: bytes) -> None:
        text = json.loads(body)["content"]
        errors = [] if re.match(r"---\n(?:[a-z_]+: .+\n)+---\n", text) else [{"message": "no front matter of simple lines"}]
        request.answer(400 if errors else 200, json.dumps({"errors": errors, "warnings": []}).encode())

    def preupload(self, request: Any, body: bytes, repo: str) -> None:
        names = [f["path"] for f in json.loads(body)["files"]]
        modes = [{"path": n, "uploadMode": "lfs" if n.endswith(".safetensors") else "regular", "shouldIgnore": False} for n in names]
        request.answer(200, json.dumps({"files": modes}).encode())

    def batch(self, request: Any, body: bytes, repo: str) -> None:
        objects = [o | {"actions": {"upload": {"href": f"{self.url}/objects/{o['oid']}"}}} for o in json.loads(body)["objects"]]
        request.answer(200, json.dumps({"transfer": "basic", "objects": objects}).encode(), Content_Type="application/vnd.git-lfs+json")

    def upload(self, request: Any, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.objects[oid] = body
        request.answer(200)

    def commit(self, request: Any, body: bytes, repo: str) -> None:
        self.commits += 1
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.files[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[repo][value["path"]] = self.objects[value["oid"]]
        url = f"{self.url}/{repo}/commit/{self.sha}"
        request.answer(200, json.dumps({"success": True, "commitUrl": url, "commitOid": self.sha, "hookOutput": ""}).encode())

    def entry(self, repo: str, name: str) -> dict[str, Any]:
        content = self.files[repo][name]
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def paths(self, request: Any, body: bytes, repo: str) -> None:
        from urllib.parse import parse_qs

        data = json.loads(body) if body.startswith(b"{") else parse_qs(body.decode())
        if not self.missing(request, repo):
            request.answer(200, json.dumps([self.entry(repo, name) for name in data["paths"] if name in self.files[repo]]).encode())

    def tree(self, request: Any, body: bytes, repo: str) -> None:
        if not self.missing(request, repo):
            request.answer(200, json.dumps([self.entry(repo, name) for name in self.files[repo]]).encode())

    def resolve(self, request: Any, body: bytes, repo: str, name: str) -> None:
        if self.missing(request, repo):
            return
        if name not in self.files[repo]:
            request.answer(404, b"{}", X_Error_Code="EntryNotFound")
            return
        content = self.files[repo][name]
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X_Repo_Commit": self.sha, "Accept_Ranges": "bytes"}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if match:
            start, end = int(match[1]), int(match[2] or len(content) - 1)
            part = content[start : end + 1]
            request.answer(206, part, **headers, Content_Range=f"bytes {start}-{start + len(part) - 1}/{len(content)}")
        else:
            request.answer(200, content, **headers, Content_Type="application/octet-stream")
