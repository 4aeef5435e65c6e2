"""The page `/docs`: the API's description to read and to try, by Swagger UI's files from a package.

Nothing of it is loaded from elsewhere: a key is typed into this page, and a service without the internet shows it too.
"""

from typing import Final

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

PAGE: Final = "/docs"
_SCRIPT, _STYLE, _ICON = "swagger-ui-bundle.js", "swagger-ui.css", "favicon-32x32.png"
PATHS: Final = frozenset({PAGE, *(f"{PAGE}/{name}" for name in (_SCRIPT, _STYLE, _ICON))})
"""What the page consists of: it shows what `/openapi.json` says, and is as open."""


def install(api: FastAPI) -> None:
    """Serve the page and its files; addresses are relative, so that it also works below a path of a proxy."""
    page = get_swagger_ui_html(
        openapi_url="openapi.json",
        title=f"{api.title} API",
        swagger_js_url=f".{PAGE}/{_SCRIPT}",
        swagger_css_url=f".{PAGE}/{_STYLE}",
        swagger_favicon_url=f".{PAGE}/{_ICON}",
    )

    async def show() -> HTMLResponse:
        return HTMLResponse(page.body)

    api.add_api_route(PAGE, show, include_in_schema=False)
    api.mount(PAGE, StaticFiles(packages=[("fastapi_swagger", "resources")]), name="docs")
