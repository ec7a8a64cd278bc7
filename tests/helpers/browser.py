"""Pages as a browser lays them out: headless Chromium, where one is at hand."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = (
    "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    "disable-component-update disable-sync disable-extensions disable-breakpad"
)
#: Opens each page in a frame of that width, without its scripts, and sends what reaches beyond the right edge of a
#: page. What lies in a box that scrolls by itself does not count.
_MEASURE = """<!doctype html><body><script>
const pages = %s, width = %d, wide = {};
const scrolls = (element) => /auto|scroll/.test(getComputedStyle(element).overflowX);
const beyond = (page) => {
  const outside = (e) => e.getBoundingClientRect().right > width + 1 && e.getBoundingClientRect().width > 0;
  const found = [...page.querySelectorAll("article *")].filter(outside);
  const loose = found.filter((e) => {
    while ((e = e.parentElement) && e !== page.body) if (scrolls(e)) return false;
    return true;
  });
  const kind = (e) => e.getAttribute("class") ?? "";
  const names = loose.map((e) => `<${e.localName} class="${kind(e)}"> ${e.textContent.slice(0, 40)}`);
  return page.documentElement.scrollWidth > width ? ["the page itself", ...names] : names;
};
const measure = (page) => new Promise((done) => {
  const frame = document.createElement("iframe");
  Object.assign(frame, { width, height: 800, src: "/" + page });
  frame.sandbox = "allow-same-origin";
  frame.onload = () => { wide[page] = beyond(frame.contentDocument).slice(0, 3); frame.remove(); done(); };
  document.body.append(frame);
});
const work = async () => { while (pages.length) await measure(pages.pop()); };
const answer = () => fetch("/measured", { method: "POST", body: JSON.stringify(wide) });
Promise.all([work(), work(), work(), work()]).then(answer);
</script></body>"""


def too_wide(site: Path, width: int, profile: Path, seconds: float = 300.0) -> dict[str, list[str]]:
    """
    Return page -> up to three elements that reach beyond `width` pixels, for every page below `site`.

    Args:
        site (`Path`): A built site.
        width (`int`): CSS pixels.
        profile (`Path`): An empty folder for the browser.
        seconds (`float`, *optional*, defaults to 300.0): How long to wait for the answer.
    """
    pages = sorted(str(path.relative_to(site)) for path in site.rglob("*.html"))
    answer: dict[str, list[str]] = {}
    arrived = threading.Event()

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None: ...

        def do_GET(self) -> None:
            if self.path != "/measure":
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write((_MEASURE % (json.dumps(pages), width)).encode())

        def do_POST(self) -> None:
            answer.update(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()
            arrived.set()

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = [f"--{option}" for option in (*OPTIONS.split(), "remote-debugging-port=0")]
    command = [BROWSER, *options, f"--user-data-dir={profile}", f"http://127.0.0.1:{server.server_port}/measure"]
    browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        if not arrived.wait(seconds):
            raise TimeoutError(f"{BROWSER} did not lay out {len(pages)} pages within {seconds:g} s.")
    finally:
        browser.terminate()
        browser.wait()
        server.shutdown()
        server.server_close()
    return {page: found for page, found in answer.items() if found}
