"""JSON schemas from clients, brought into a form that llguidance compiles: safe, and as people mean them.

Known misspellings of types are read as what they mean (the InternLM course writes "int"), unknown formats are dropped,
objects are closed where that is what their author will expect, and whatever would take llguidance long is refused.
"""

TYPES = {
    **{name: name for name in ("object", "array", "string", "number", "integer", "boolean", "null")},
    **dict.fromkeys(("int", "int32", "int64", "long"), "integer"),
    **dict.fromkeys(("float", "double", "decimal"), "number"),
    **dict.fromkeys(("str", "text"), "string"),
    **dict.fromkeys(("dict", "map"), "object"),
    **dict.fromkeys(("list", "tuple", "set"), "array"),
    "bool": "boolean",
    **dict.fromkeys(("none", "nonetype"), "null"),
}
ANY = "any"  # no type at all
FORMATS = {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}

SCHEMAS = {"items", "additionalProperties", "contains", "not", "if", "then", "else", "propertyNames"}
LISTS = {"anyOf", "allOf", "oneOf", "prefixItems"}
NAMED = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}

DEEPEST = 40  # schemas in one another
MOST_SCHEMAS = 3000
MOST_PROPERTIES = 1000  # of one object: the work grows with their square
MOST_REFERENCES = 256  # different ones: llguidance follows them on the C stack, at about 5 KB each ...
LONGEST_PATH = 1536  # ... and 2 KB for a schema; different references x depth
MOST_MERGED = 12  # patterns that may have to hold at once: each may double the work
TOO_DEEP = f"the JSON schema nests too deep; {DEEPEST} schemas in one another are the most"


def normalized(schema: dict | bool) -> dict:
    """`schema` as a new object; ValueError names what cannot be used."""
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    if not isinstance(schema, dict):
        raise ValueError(f"a JSON schema is an object, not {_name(schema)}")
    reader = _Reader()
    made = reader.schema(schema, 1)
    made.pop("x-guidance", None)
    reader.bounded()
    if not reader.merges:
        for node in reader.open:
            node["additionalProperties"] = False
    return made


class _Reader:
    """Walks through one schema, copies it, and counts what makes it expensive."""

    def __init__(self):
        self.depth = self.schemas = 0
        self.references: set[str] = set()
        self.patterns = 0
        self.merges = 0  # places where two schemas must hold for the same value
        self.open: list[dict] = []  # objects that list their properties and do not say whether there are more

    def schema(self, given, depth: int):
        if isinstance(given, bool):
            return given
        if not isinstance(given, dict):
            raise ValueError(f"a JSON schema is an object, not {_name(given)}")
        if depth > DEEPEST:
            raise ValueError(TOO_DEEP)
        self.depth = max(self.depth, depth)
        self.schemas += 1
        if self.schemas > MOST_SCHEMAS:
            raise ValueError(f"the JSON schema is too large; {MOST_SCHEMAS} schemas in it are the most")
        made = {}
        for key, value in given.items():
            if key in SCHEMAS and not (key == "items" and isinstance(value, list)):
                made[key] = self.schema(value, depth + 1)
            elif key in LISTS or key == "items":
                made["prefixItems" if key == "items" else key] = self._list(key, value, depth)
            elif key in NAMED:
                made[key] = self._named(key, value, depth)
            elif key == "type":
                self._type(made, value)
            elif key != "format" or value in FORMATS:
                made[key] = value
        self._count(made)
        self._complete(made)
        return made

    def _list(self, key: str, value, depth: int) -> list:
        if not isinstance(value, list):
            raise ValueError(f"JSON schema: {key} is a list of schemas, not {_name(value)}")
        return [self.schema(one, depth + 1) for one in value]

    def _named(self, key: str, value, depth: int) -> dict:
        if not isinstance(value, dict):
            raise ValueError(f"JSON schema: {key} is an object of schemas, not {_name(value)}")
        if len(value) > MOST_PROPERTIES:
            raise ValueError(f"JSON schema: {key} has {len(value)} entries; {MOST_PROPERTIES} are the most")
        self.patterns += len(value) * (key == "patternProperties")
        return {name: self.schema(one, depth + 1) for name, one in value.items()}

    def _type(self, made: dict, value) -> None:
        names = value if isinstance(value, list) else [value]
        types = []
        for name in names:
            known = TYPES.get(name.lower(), name.lower()) if isinstance(name, str) else None
            if known == ANY:
                return
            if known not in TYPES.values():
                raise ValueError(
                    f"JSON schema: {_name(name)} is no type; they are {', '.join(sorted(set(TYPES.values())))}"
                )
            types.append(known)
        made["type"] = types if isinstance(value, list) else types[0]

    def _count(self, node: dict) -> None:
        self.patterns += ("pattern" in node) + ("format" in node)
        if isinstance(node.get("$ref"), str):
            self.references.add(node["$ref"])
        said = node.keys() & _SAYING
        self.merges += max(len(node.get("allOf", ())) - 1, 0) + max(len(said & _COMBINING) - 1, 0)
        self.merges += bool(said & _COMBINING and said - _COMBINING)

    def _complete(self, node: dict) -> None:
        """What people leave out: that something with properties is an object, and that there are no others."""
        if node.get("nullable") is True and isinstance(node.get("type"), str):
            node["type"] = [node["type"], "null"]
        if "properties" not in node:
            return
        if not node.keys() & (_COMBINING | {"type", "enum", "const"}):
            node["type"] = "object"
        if "additionalProperties" not in node and "patternProperties" not in node:
            self.open.append(node)

    def bounded(self) -> None:
        if len(self.references) > MOST_REFERENCES or len(self.references) * self.depth > LONGEST_PATH:
            raise ValueError(
                f"the JSON schema has {len(self.references)} different references in {self.depth} levels; "
                f"{min(MOST_REFERENCES, LONGEST_PATH // self.depth)} are the most"
            )
        if min(self.patterns, self.merges + 1) > MOST_MERGED:
            raise ValueError(
                f"the JSON schema combines {self.patterns} patterns and formats in {self.merges} places (allOf and the "
                f"like); {MOST_MERGED} are the most"
            )


_COMBINING = {"$ref", "allOf", "anyOf", "oneOf"}
_SAYING = _COMBINING | {
    *("type", "enum", "const", "properties", "patternProperties", "additionalProperties", "required"),
    *("items", "prefixItems", "pattern", "format", "minLength", "maxLength", "minimum", "maximum", "multipleOf"),
    *("exclusiveMinimum", "exclusiveMaximum", "minItems", "maxItems", "minProperties", "maxProperties", "not"),
}


def _name(value) -> str:
    return f"{value!r:.60}" if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
