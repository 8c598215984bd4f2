"""/openapi.json with our real bodies in it, and /docs: one small page that renders it, without any other host."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

Json = dict[str, Any]
_REFS = "#/components/schemas/{model}"

ERROR_SCHEMA: Json = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code", "request_id"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
                "request_id": {"type": "string"},
            },
        }
    },
}


def body_of(model: type[BaseModel]) -> Json:
    """openapi_extra of a route that reads its body itself."""
    schema = {"$ref": _REFS.format(model=model.__name__)}
    errors = {
        str(status): {
            "description": text,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
        }
        for status, text in (("4XX", "The request can't be served"), ("5XX", "The service can't serve it now"))
    }
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": errors,
    }


def openapi(app: FastAPI, models: tuple[type[BaseModel], ...]) -> Json:
    """The document, made once."""
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    schemas: Json = document.setdefault("components", {}).setdefault("schemas", {})
    schemas["Error"] = ERROR_SCHEMA
    for model in models:
        schema = model.model_json_schema(ref_template=_REFS)
        schemas.update(schema.pop("$defs", {}))
        schemas[model.__name__] = schema
    return document


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>neap API</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h2 { margin-top: 2rem } code, pre, td:first-child { font-family: ui-monospace, monospace }
table { border-collapse: collapse } td { border-bottom: 1px solid #ddd; padding: .2rem .8rem .2rem 0 }
pre { background: #f4f4f4; padding: .8rem; overflow: auto } .verb { color: #06c; text-transform: uppercase }
</style>
<h1>neap API</h1><p>OpenAI-style endpoints. The same as JSON: <a href="/openapi.json">/openapi.json</a>.</p>
<main id="out">Loading ...</main>
<script>
const make = (tag, text, parent, cls) => {
  const node = document.createElement(tag);
  node.textContent = text; if (cls) node.className = cls; parent.append(node); return node;
};
const kind = (s) => s.anyOf ? s.anyOf.map(kind).join(" | ") : s.$ref ? s.$ref.split("/").pop()
  : s.type === "array" ? "list of " + kind(s.items || {}) : String(s.type || "any");
const key = new URLSearchParams(location.hash.slice(1)).get("key");
fetch("/openapi.json", key ? { headers: { Authorization: "Bearer " + key } } : {}).then((r) => r.json()).then((doc) => {
  const out = document.getElementById("out"); out.textContent = "";
  for (const [path, verbs] of Object.entries(doc.paths)) for (const [verb, op] of Object.entries(verbs)) {
    const head = make("h2", "", out); make("span", verb + " ", head, "verb"); make("code", path, head);
    make("p", op.description || op.summary || "", out);
    const body = op.requestBody && op.requestBody.content["application/json"].schema;
    if (!body || !body.$ref) continue;
    const schema = doc.components.schemas[body.$ref.split("/").pop()], table = make("table", "", out);
    for (const [name, field] of Object.entries(schema.properties)) {
      const row = make("tr", "", table); make("td", name, row); make("td", kind(field), row);
      make("td", (schema.required || []).includes(name) ? "required" : "", row);
    }
  }
}).catch((error) => { document.getElementById("out").textContent = "No schema: " + error; });
</script></html>
"""
