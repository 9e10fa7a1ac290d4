"""A server with OpenAI's chat protocol on the loopback, which misbehaves as a test says."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FaultServer:
    """plan(number of the request, its body) -> text of the answer, or a fault: a dict with some of status, headers,
    body (bytes or JSON), short (send only half of the body), slow (seconds between bytes), reset, answer (the text)
    and finish. Requests are kept in `requests`, the most at a time in `most`."""

    def __init__(self, plan=None):
        self.plan = plan or (lambda n, body: "answer")
        self.requests, self.headers, self.active, self.most = [], [], 0, 0
        self.models, self.lock = ["the-model"], threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self.send({"body": {"data": [{"id": name} for name in outer.models]}})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    n = len(outer.requests)
                    outer.requests.append(body | {"path": self.path, "at": time.monotonic()})
                    outer.headers.append(dict(self.headers))
                    outer.active += 1
                    outer.most = max(outer.most, outer.active)
                try:
                    fault = outer.plan(n, body)
                    fault = {"answer": fault} if isinstance(fault, str) else fault
                    if "answer" in fault:
                        message = {"role": "assistant", "content": fault["answer"]} | fault.get("message", {})
                        choice = {"index": 0, "message": message, "finish_reason": fault.get("finish", "stop")}
                        words = len((fault["answer"] or "").split())
                        fault = {"body": {"choices": [choice], "usage": {
                            "prompt_tokens": 10, "completion_tokens": words}} | fault.get("more", {})} | fault
                    self.send(fault)
                finally:
                    with outer.lock:
                        outer.active -= 1

            def send(self, fault):
                if fault.get("reset"):
                    self.connection.close()
                    return
                body = fault.get("body", b"")
                body = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(fault.get("status", 200))
                for name, value in fault.get("headers", {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                try:
                    if "slow" in fault:
                        for byte in body:
                            self.wfile.write(bytes([byte]))
                            self.wfile.flush()
                            time.sleep(fault["slow"])
                    else:
                        self.wfile.write(body[:len(body) // 2] if fault.get("short") else body)
                except OSError:
                    pass
                self.close_connection = True

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
