"""GET /openapi.json and /docs: the description of the API for programs, and as a page for people.

The page is Swagger UI. Its files come from the package `fastapi-offline`: a ring may have no way to the internet.
All of it is open without a key: it says what anybody can read in docs/api.md.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from api.openapi import document
from api.service import service_of

router = APIRouter()

_SWAGGER_UI = Path(str(files("fastapi_offline"))) / "static"


@router.api_route("/openapi.json", methods=["GET", "HEAD"])
async def openapi_document(request: Request) -> Response:
    settings = service_of(request).settings
    return JSONResponse(document(settings.model_name, bool(settings.api_keys)))


@router.api_route("/docs", methods=["GET", "HEAD"])
async def docs() -> Response:
    return get_swagger_ui_html(
        openapi_url="openapi.json",
        title="mlx-ring-server",
        swagger_js_url="docs/swagger-ui-bundle.js",
        swagger_css_url="docs/swagger-ui.css",
        swagger_favicon_url="data:,",
        swagger_ui_parameters={"defaultModelsExpandDepth": 0},  # there are a hundred
    )


@router.api_route("/docs/swagger-ui-bundle.js", methods=["GET", "HEAD"])
async def swagger_ui_script() -> Response:
    return FileResponse(_SWAGGER_UI / "swagger-ui-bundle.js")


@router.api_route("/docs/swagger-ui.css", methods=["GET", "HEAD"])
async def swagger_ui_style() -> Response:
    return FileResponse(_SWAGGER_UI / "swagger-ui.css")
