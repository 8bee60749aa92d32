"""What every route goes through: bodies, keys, host names, foreign pages, errors."""

import http.client
import logging

import orjson
import pytest

from jaxserve.serve.logs import Json
from tests.serve.live import live
from tests.serve.local import MODEL, serving

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
GOOD = orjson.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hi"}]})
JSON = {"content_type": "application/json"}


@pytest.fixture(scope="module")
def server():
    with serving() as made:
        yield made


@pytest.mark.parametrize(
    "data, said",
    [
        (b"{", "not valid JSON"),
        (b"", "the body is empty"),
        (b"  \n", "the body is empty"),
        (b"[]", "must be a JSON object, not a list"),
        (b'"x"', "not a text"),
        (b"null", "not null"),
        (b"5", "not a number"),
        (b"true", "not a truth value"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a":' * 50_000, "not valid JSON"),
        (b'{"a": "\\ud800"}', "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (GOOD + b"x", "not valid JSON"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
    ids=lambda value: repr(value[:12]) if isinstance(value, bytes) else None,
)
def test_bad_bodies(server, data, said):
    status, answer = server.post(CHAT, data=data, **JSON)
    assert status == 400 and said in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_json_has_not(server, number):
    data = GOOD[:-1] + f', "temperature": {number}}}'.encode()
    status, answer = server.post(CHAT, data=data, **JSON)
    assert (status, answer["error"]["param"]) == (400, "temperature")


def test_deep_values(server):
    deep = b"[" * 1000 + b"]" * 1000
    for name in (b"temperature", b"tools", b"stop", b"user", b"response_format", b"chat_template_kwargs", b"messages"):
        status, _ = server.post(CHAT, data=GOOD[:-1] + b', "' + name + b'": ' + deep + b"}", **JSON)
        assert status == (200 if name == b"user" else 400), name
    tool = b'{"type": "function", "function": {"name": "f", "parameters": {"a": ' + deep[4:-4] + b"}}}"
    assert server.post(CHAT, data=GOOD[:-1] + b', "tools": [' + tool + b"]}", **JSON)[0] in (200, 400)


@pytest.mark.parametrize(
    "kind, status",
    [
        ("application/json", 200),
        ("application/json; charset=utf-8", 200),
        ("application/vnd.api+json", 200),
        (None, 200),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
    ],
)
def test_content_types(server, kind, status):
    found, answer = server.post(CHAT, data=GOOD, content_type=kind)
    assert found == status, answer
    if kind == "application/x-www-form-urlencoded":
        assert "curl" in answer["error"]["message"]


def test_a_web_page_cannot_leave_out_the_content_type(server):
    assert server.post(CHAT, data=GOOD, headers={"Origin": "https://example.org"})[0] == 415


def test_large_bodies():
    with serving(options={"max_body_size": 0.01}) as server:
        assert server.post(CHAT, data=GOOD + b" " * 11_000, **JSON)[0] == 413
        assert server.post(CHAT, data=GOOD + b" " * 1_000, **JSON)[0] == 200


def test_large_bodies_in_chunks():
    with live(options={"max_body_size": 0.01}) as (_, url):
        for size, status in ((1_000, 200), (11_000, 413), (200_000, 413)):
            host, port = url.removeprefix("http://").split(":")
            client = http.client.HTTPConnection(host, int(port))
            body = iter([GOOD, b" " * (size // 2), b" " * (size // 2)])
            client.request("POST", CHAT, body, {"Content-Type": "application/json"}, encode_chunked=True)
            assert client.getresponse().status == status
            client.close()


def test_a_text_that_cannot_fit_is_not_tokenized(server, monkeypatch):
    monkeypatch.setattr(server.service.tokenizer, "encode", None)
    status, answer = server.post(COMPLETION, {"prompt": "a" * 100_000})
    assert status == 400 and "100000 characters" in answer["error"]["message"]


def test_unknown_routes_and_methods(server):
    for path in (
        "/nope",
        "/v1",
        "/v1/chat",
        "/v1//models",
        "/V1/models",
        "/v1/models/../../etc/passwd",
        "/v1/models/%2e",
    ):
        response = server.client.get("/", environ_overrides={"PATH_INFO": path})
        assert response.status_code == 404 and response.json["error"]["type"] == "not_found_error", path
    response = server.client.get(CHAT)
    assert response.status_code == 405 and response.json["error"]["message"]


def test_what_nobody_foresaw_is_told_without_details(server, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("secret at 0x7f00 in /home/me")

    monkeypatch.setattr(server.service, "start", fail)
    response = server.client.post(CHAT, data=GOOD, **JSON)
    assert response.status_code == 500 and response.headers["x-should-retry"] == "false"
    assert "secret" not in response.text and "secret" in caplog.text


def test_request_ids(server):
    given = server.client.get("/v1/models", headers={"X-Request-Id": "my-id.7"}).headers["X-Request-Id"]
    assert given == "my-id.7"
    for bad in ("a b", "x" * 200, ""):
        made = server.client.get("/v1/models", headers={"X-Request-Id": bad}).headers["X-Request-Id"]
        assert made != bad and len(made) == 32
    assert server.client.get("/nope").headers["X-Request-Id"]


@pytest.mark.parametrize("field", ["request_id", "rid"])  # vLLM's, SGLang's
def test_request_ids_in_a_body(server, field):
    def ask(name, **headers):
        response = server.client.post(COMPLETION, json={"prompt": "a", "max_tokens": 1, field: name}, headers=headers)
        return response.headers["X-Request-Id"], response.json["id"]

    assert ask("mine") == ("mine", "cmpl-mine")
    assert ask("mine", **{"X-Request-Id": "theirs"}) == ("theirs", "cmpl-theirs")
    found, told = ask("not for\na header")
    assert len(found) == 32 and told == f"cmpl-{found}"
    response = server.client.post(COMPLETION, json={"prompt": "", field: "bad"})
    assert (response.status_code, response.headers["X-Request-Id"]) == (400, "bad")


def test_access_is_logged(server, caplog):
    with caplog.at_level(logging.INFO, "jaxserve.access"):
        server.client.get("/v1/models?key=secret", headers={"X-Request-Id": "abc"}).close()
    (record,) = [record for record in caplog.records if record.name == "jaxserve.access"]
    line = record.getMessage()
    assert "GET /v1/models 200" in line and "abc" in line and "secret" not in line
    told = orjson.loads(Json().format(record))
    assert (told["method"], told["path"], told["status"], told["request_id"]) == ("GET", "/v1/models", 200, "abc")
    assert told["milliseconds"] >= 0 and told["client"] == "127.0.0.1"


# Keys. ----------------------------------------------------------------------------------------------------------------

KEYS = {"api_keys": ["first-key", "schlüssel"]}


def test_keys():
    with serving(options=KEYS) as server:
        get = server.client.get
        for given in (
            {},
            {"Authorization": "Bearer"},
            {"Authorization": "Bearer first-ke"},
            {"Authorization": "Bearer first-keyx"},
            {"Authorization": "first-key"},
            {"x-api-key": "no"},
        ):
            response = get("/v1/models", headers=given)
            assert response.status_code == 401 and response.json["error"]["code"] == "invalid_api_key", given
        for given in (
            {"Authorization": "Bearer first-key"},
            {"authorization": "bearer first-key"},
            {"x-api-key": "first-key"},
        ):
            assert get("/v1/models", headers=given).status_code == 200


def test_every_route_asks_for_a_key_unless_it_is_open():
    with serving(options=KEYS) as server:
        opened = {"/", "/health", "/docs", "/openapi.json"}
        for rule in server.app.url_map.iter_rules():
            path = rule.rule.replace("<path:name>", MODEL).replace("<string:", "<").replace("<", "").replace(">", "")
            for method in rule.methods - {"HEAD"}:
                status = server.client.open(path, method=method).status_code
                free = rule.rule in opened or rule.rule.startswith(("/static/", "/docs/"))
                assert (status != 401) == free, (method, path, status)
        for path in (
            "//v1/models",
            "/V1/models",
            "/nope",
            "/v1/models/..",
            "/v1/models%2f",
            "/%2e/v1/models",
            "/docs/../v1/models",
        ):
            assert server.client.get("/", environ_overrides={"PATH_INFO": path}).status_code == 401, path


def test_host_names_do_not_bear_on_keys():
    with serving(options=KEYS | {"server_name": "0.0.0.0"}) as server:
        for host in ("x/?", "x", "localhost", "evil/health?"):
            response = server.client.get("/v1/models", headers={"Host": host})
            assert response.status_code in (400, 401), host


@pytest.mark.parametrize(
    "host, status",
    [
        ("localhost", 200),
        ("localhost:23333", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("LOCALHOST", 200),
        ("evil.example", 403),
        ("evil.example:80", 403),
        ("127.0.0.1.evil.example", 403),
    ],
)
def test_a_loopback_server_answers_to_its_own_names(server, host, status):
    assert server.client.get("/v1/models", headers={"Host": host}).status_code == status


def test_allowed_hosts():
    with serving(options={"server_name": "0.0.0.0"}) as server:
        assert server.client.get("/v1/models", headers={"Host": "any.example"}).status_code == 200
    with serving(options={"allowed_hosts": ["llm.example"]}) as server:
        assert server.client.get("/v1/models", headers={"Host": "llm.example:80"}).status_code == 200
        assert server.client.get("/v1/models", headers={"Host": "localhost"}).status_code == 403


# Pages of other origins. ----------------------------------------------------------------------------------------------

PREFLIGHT = {
    "Origin": "https://page.example",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, content-type",
}


def shared(response):
    return {name.lower(): value for name, value in response.headers if name.lower().startswith("access-control")}


def test_no_page_of_another_origin_by_default(server):
    response = server.client.options(CHAT, headers=PREFLIGHT)
    assert not shared(response)
    assert not shared(server.client.get("/v1/models", headers={"Origin": "https://page.example"}))


def test_pages_that_were_allowed():
    with serving(options={"allow_origins": ["https://page.example"], **KEYS}) as server:
        response = server.client.options(CHAT, headers=PREFLIGHT)
        assert response.status_code == 204
        assert shared(response) == {
            "access-control-allow-origin": "https://page.example",
            "access-control-expose-headers": "X-Request-Id, Retry-After",
            "access-control-allow-methods": "GET, POST, DELETE, OPTIONS",
            "access-control-allow-headers": "authorization, content-type",
            "access-control-max-age": "600",
        }
        response = server.client.get("/v1/models", headers={"Origin": "https://page.example"})
        assert response.status_code == 401 and "access-control-allow-origin" in shared(response)
        assert not shared(server.client.options(CHAT, headers=PREFLIGHT | {"Origin": "https://other.example"}))
    with serving(options={"allow_origins": ["*"]}) as server:
        assert shared(server.client.options(CHAT, headers=PREFLIGHT))["access-control-allow-origin"] == "*"


def test_the_document_knows_the_path_before_all_routes():
    with serving(options={"root_path": "/llm"}) as server:
        assert server.client.get("/openapi.json").json["servers"] == [{"url": "/llm"}]


def test_without_pages():
    with serving(options={"disable_fastapi_docs": True}) as server:
        for path in ("/", "/docs", "/openapi.json"):
            assert server.client.get(path).status_code == 404


def test_a_body_that_cannot_be_read(server, monkeypatch):
    """What gunicorn raises where a chunk has no size is no OSError."""

    def fail(*_, **__):
        raise Exception("Invalid chunk size: b'zz'")

    monkeypatch.setattr("werkzeug.wrappers.Request.get_data", fail)
    status, answer = server.post(CHAT, data=GOOD, **JSON)
    assert status == 400 and "its chunks have no size" in answer["error"]["message"]
