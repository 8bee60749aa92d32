"""The pages' files: their headers, that they alone need no key, and that nothing comes from elsewhere."""

import re
import shutil
import subprocess

import pytest

from jaxserve.serve import pages
from tests.serve import scripted

OWN = [path for path, file in pages.FILES.items() if file.parent == pages.STATIC]
EVERY = sorted(pages.FILES)


@pytest.fixture(scope="module")
def client():
    with scripted.app(keys=["secret"]) as app:
        yield app.test_client()


def test_every_file_is_served():
    served = {file.name for file in pages.FILES.values() if file.parent == pages.STATIC}
    assert served == {file.name for file in pages.STATIC.iterdir()}


@pytest.mark.parametrize("path", EVERY)
def test_open_without_a_key(client, path):
    response = client.get(path)
    assert response.status_code == 200 and len(response.data) > 100
    assert response.content_type.split(";")[0] == pages.TYPES[pages.FILES[path].suffix]


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/docs/", "/static/", "/docs/x", "/static/../v1/models"])
def test_nothing_else_is(client, path):
    assert client.get(path).status_code == 401


@pytest.mark.parametrize(
    "path", ["/static/../pages.py", "/docs/../../etc/passwd", "/static/%2e%2e/pages.py", "/docs/LICENSE"]
)
def test_no_way_out_of_the_folders(client, path):
    response = client.get(path, headers={"Authorization": "Bearer secret"})
    assert response.status_code == 404


@pytest.mark.parametrize("path", EVERY)
def test_headers(client, path):
    headers = client.get(path).headers
    policy = dict(part.strip().partition(" ")[::2] for part in headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
    assert policy["script-src"] == policy["connect-src"] == "'self'"
    if path != "/docs":
        assert policy["style-src"] == policy["img-src"] == "'self'"
        assert policy["require-trusted-types-for"] == "'script'" and policy["trusted-types"] == "'none'"
    assert "unsafe-eval" not in str(policy) and "http" not in str(policy)
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cache-Control"] == "no-cache" and headers["ETag"]


def test_unchanged_files_are_not_sent_again(client):
    first = client.get("/static/app.js")
    again = client.get("/static/app.js", headers={"If-None-Match": first.headers["ETag"]})
    assert (again.status_code, again.data) == (304, b"")
    assert again.headers["Content-Security-Policy"]


@pytest.mark.parametrize("path", OWN)
def test_nothing_comes_from_elsewhere(path):
    text = pages.FILES[path].read_text(encoding="utf-8")
    addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"'`]*", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}, addresses  # a name, not an address
    assert not re.search(r"@import|url\(", text)


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_what_a_page_names_is_served(client, path):
    text = client.get(path).get_data(as_text=True)
    named = re.findall(r'(?:src|href)="([^"#]+)"', text)
    assert named
    for name in named:
        assert client.get("/" + name.removeprefix("./")).status_code == 200, name
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\son\w+=|\sstyle=|javascript:", text)


@pytest.mark.parametrize("path", [path for path in OWN if path.endswith(".js")])
def test_scripts_build_no_html(path):
    text = pages.FILES[path].read_text(encoding="utf-8")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)
    for module in re.findall(r'from "\./([\w.]+)"', text):
        assert f"/static/{module}" in pages.FILES


def test_every_id_that_a_script_asks_for_is_there():
    for page, scripts in (("index.html", ("app.js", "panels.js", "view.js")), ("docs.html", ("docs.js",))):
        ids = set(re.findall(r'\bid="([\w-]+)"', (pages.STATIC / page).read_text(encoding="utf-8")))
        for script in scripts:
            asked = set(re.findall(r'\$\("([\w-]+)"\)', (pages.STATIC / script).read_text(encoding="utf-8")))
            assert asked <= ids, asked - ids


@pytest.mark.skipif(not shutil.which("node"), reason="node reads the scripts' syntax; it is not installed")
@pytest.mark.parametrize("path", [path for path in OWN if path.endswith(".js")])
def test_syntax(path):
    done = subprocess.run(["node", "--check", pages.FILES[path]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_pages_can_be_left_out():
    from jaxserve.serve.app import create_app
    from jaxserve.serve.options import ServerOptions

    service = scripted.service()
    try:
        client = create_app(service, ServerOptions(disable_fastapi_docs=True)).test_client()
        assert [client.get(path).status_code for path in ("/", "/docs", "/health")][:2] == [404, 404]
    finally:
        service.engine.close()
