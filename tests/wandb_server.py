"""A substitute for W&B's server on the loopback address, with what the client needs.

It takes runs and their history, and says on resume how far it has them. It can be made to take
nothing, or to lose what comes, at any time.
"""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0" * 40


class Server:
    """The received data.

    Attributes:
        runs: by their ids; what each has.
        received: the rows of each run, as they came; one that came twice is there twice.
        room: rows of a run that are kept; what comes after is lost. None is all.
        attempts: the paths of all requests.
        delay: seconds before each answer.
        refuse: whether all requests fail.
        unknown: queries that it cannot answer.
    """

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.attempts: list[str] = []
        self.unknown: list[str] = []
        self.received: dict[str, list[dict[str, Any]]] = {}
        self.room: int | None = None
        self.url = ""
        self.delay = 0.0
        self.refuse = False
        self.lock = threading.Lock()

    def forget(self) -> None:
        """Drop everything, like a new project."""
        with self.lock:
            self.runs.clear()
            self.received.clear()

    def steps(self, run: str) -> list[int]:
        return [row["_step"] for row in self.runs[run]["history"]]

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """GraphQL, by the fields that a query names."""
        if "upsertBucket" in query:
            return {"upsertBucket": {"bucket": self._upsert(variables), "inserted": True}}
        if "createRunFiles" in query:
            files = [{"name": n, "uploadUrl": f"{self.url}/upload/{n}"} for n in variables["files"]]
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        if "viewer" in query:
            viewer: dict[str, Any] = {
                "id": "u",
                "username": "someone",
                "entity": "someone",
                "flags": "{}",
            }
            viewer |= {
                "email": "",
                "admin": False,
                "teams": {"edges": []},
                "apiKeys": {"edges": []},
            }
            return {"viewer": viewer, "serverInfo": None}
        if "project(" in query or "model(" in query:
            run = self.runs.get(variables.get("name") or variables.get("run") or "")
            if "model(" in query:
                return {"model": {"bucket": run and self._bucket(run)}}
            return {
                "project": {"run": run and self._bucket(run), "internalId": "1", "readOnly": False}
            }
        self.unknown.append(query)
        return {}

    def _upsert(self, given: dict[str, Any]) -> dict[str, Any]:
        new: dict[str, Any] = {"id": given["name"], "history": [], "summary": {}, "exit": None}
        run = self.runs.setdefault(given["name"], new)
        run["state"] = given.get("state") or "running"
        for theirs, own in (
            ("displayName", "name"), ("groupName", "group"), ("tags", "tags"), ("config", "config"),
            ("project", "project"), ("entity", "entity"), ("jobType", "job_type"),
        ):  # fmt: skip
            if given.get(theirs) is not None:
                run[own] = given[theirs]
        return self._bucket(run)

    def _bucket(self, run: dict[str, Any]) -> dict[str, Any]:
        project, entity = run.get("project") or "uncategorized", run.get("entity") or "someone"
        last = run["history"][-1] if run["history"] else {}
        return {
            "id": run["id"], "name": run["id"], "displayName": run.get("name"),
            "sweepName": None, "projectId": "1", "state": run["state"], "description": None,
            "project": {"id": "1", "name": project, "entity": {"id": "1", "name": entity}},
            "historyLineCount": len(run["history"]), "eventsLineCount": 0, "logLineCount": 0,
            "historyTail": json.dumps([json.dumps(last)] if last else []), "eventsTail": "[]",
            "historyKeys": {"lastStep": last.get("_step", -1)},
            "summaryMetrics": json.dumps(run["summary"]), "config": run.get("config") or "{}",
            "tags": run.get("tags") or [], "group": run.get("group"), "jobType": None,
            "createdAt": "2026-01-01T00:00:00", "heartbeatAt": "2026-01-01T00:00:00",
            "wandbConfig": '{"t": 1}', "files": {"edges": []}, "stopped": False, "commit": None,
            "readOnly": False, "user": {"name": "x", "username": "someone"}, "sweep": None,
            "systemMetrics": "{}", "notes": None, "groupName": run.get("group"),
        }  # fmt: skip

    def stream(self, run: str, body: dict[str, Any]) -> None:
        """What the client calls a file stream: lines that follow those which are there."""
        known = self.runs.get(run)
        if known is None:  # of a sweep that was killed before `forget`
            return
        for name, part in (body.get("files") or {}).items():
            if name == "wandb-history.jsonl":
                rows = [json.loads(line) for line in part["content"]]
                rows = rows[: None if self.room is None else self.room - len(known["history"])]
                self.received.setdefault(run, []).extend(rows)
                known["history"][part["offset"] :] = rows
            if name == "wandb-summary.json" and self.room is None:
                known["summary"] |= json.loads(part["content"][-1])
        if body.get("complete"):
            known["exit"] = body.get("exitcode")
            known["state"] = "crashed" if known["exit"] else "finished"
        if body.get("preempting"):
            known["state"] = "preempted"


class _Handler(BaseHTTPRequestHandler):
    server: Any
    protocol_version = "HTTP/1.1"

    def _body(self) -> dict[str, Any]:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not self.path.endswith(("/graphql", "/file_stream")):  # files, metrics of the client
            return {}
        if self.headers.get("Content-Encoding") == "gzip":
            content = gzip.decompress(content)
        return json.loads(content) if content else {}

    def _send(self, value: Any, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        known: Server = self.server.known
        known.attempts.append(self.path)
        time.sleep(known.delay)
        self._send({}, 503 if known.refuse else 200)

    def do_POST(self) -> None:
        known: Server = self.server.known
        body = self._body()
        known.attempts.append(self.path)
        time.sleep(known.delay)
        if known.refuse:
            return self._send({"errors": ["refused"]}, 503)
        with known.lock:
            if self.path.endswith("/graphql"):
                variables = body.get("variables") or {}
                return self._send({"data": known.answer(body["query"], variables)})
            if self.path.endswith("/file_stream"):
                known.stream(self.path.split("/")[-2], body)
        return self._send({"limits": {}})

    do_PUT = do_POST

    def log_message(self, *_: Any) -> None: ...


@contextmanager
def serve(known: Server | None = None) -> Iterator[tuple[Server, str]]:
    """A server, and its address."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.known = known or Server()
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # a client that was killed
    server.known.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.known, server.known.url
    finally:
        server.shutdown()
        server.server_close()
