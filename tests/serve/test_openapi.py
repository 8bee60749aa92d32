"""The OpenAPI document: every route is in it, and everything that it points to."""

import pytest

from jaxserve.serve import pages
from tests.serve.local import serving


@pytest.fixture(scope="module")
def server():
    with serving(options={"api_keys": ["key"]}) as made:
        yield made


@pytest.fixture(scope="module")
def document(server):
    return server.client.get("/openapi.json").json


def operations(document):
    return {(path, method): it for path, part in document["paths"].items() for method, it in part.items()}


def values(node, name):
    """Everything that stands under a key of that name, wherever."""
    if isinstance(node, dict):
        yield from (value for key, value in node.items() if key == name and isinstance(value, str))
        node = list(node.values())
    if isinstance(node, list):
        for part in node:
            yield from values(part, name)


def test_every_route_is_told(server, document):
    routes = set()
    for rule in server.app.url_map.iter_rules():
        if rule.rule not in pages.PATHS:
            path = rule.rule.replace("<path:", "<").replace("<string:", "<").replace("<", "{").replace(">", "}")
            routes |= {(path, method.lower()) for method in rule.methods - {"HEAD", "OPTIONS"}}
    told = {(part_of(path), method) for path, method in operations(document)}
    there = {(part_of(path), method) for path, method in routes}
    assert told == there - {("/v1/responses/compact", "post")}  # it says that it is not there


def part_of(path):
    """A path without the names of what varies."""
    return "/".join("{}" if part.startswith("{") else part for part in path.split("/"))


def test_what_it_points_to_is_there(document):
    assert document["openapi"] == "3.1.0" and document["info"]["version"]
    for reference in values(document, "$ref"):
        name = reference.removeprefix("#/components/schemas/")
        assert name in document["components"]["schemas"], reference


def test_operations(document):
    told = operations(document)
    assert len({operation["operationId"] for operation in told.values()}) == len(told)
    for (path, method), operation in told.items():
        assert operation["summary"] and operation["tags"], path
        assert {"401", "500"} <= set(operation["responses"]), path
        named = {parameter["name"] for parameter in operation.get("parameters", ()) if parameter["in"] == "path"}
        assert named == {part[1:-1] for part in path.split("/") if part.startswith("{")}
        if "requestBody" in operation:
            assert {"400", "413", "415", "503"} <= set(operation["responses"]), path
        assert ("security" in operation) == (path not in ("/health", "/openapi.json")), (path, method)


def test_what_bodies_need(document):
    schemas = document["components"]["schemas"]
    assert sorted(schemas["ChatRequest"]["required"]) == ["messages", "model"]
    assert schemas["CompletionBody"]["required"] == ["prompt"]
    temperature = schemas["ChatRequest"]["properties"]["temperature"]["anyOf"]
    assert {"type": "null"} in temperature and temperature[0]["maximum"] == 2


def test_streams(document):
    content = document["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
    assert set(content) == {"application/json", "text/event-stream"}
    assert "ChatChunk" in str(content["text/event-stream"])


def test_it_holds_no_data(document):
    assert "fake-1b" not in str(document["paths"]) and "security" in str(document)
