"""A service that loads models by name and keeps them on its disk.

    MODELS=s3://models/{name}/{version}/ uvicorn examples.fastapi_service:app

What it needs: pip install modelfs fastapi uvicorn. The endpoints are plain functions, which FastAPI runs in threads:
``ModelCache`` blocks while it downloads.
"""

import dataclasses
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Request

from modelfs import ModelCache
from modelfs.errors import ConfigError, ModelfsError, ObjectNotFoundError


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open the cache with the service; it holds nothing that would have to be closed."""
    app.state.models = ModelCache(
        os.environ.get("MODEL_CACHE", "/var/cache/models"),
        os.environ["MODELS"],
        max_bytes=int(os.environ.get("MODEL_CACHE_BYTES", "0")),
    )
    yield


app = FastAPI(lifespan=lifespan)


@app.post("/models/{name}/{version}")
def load(name: str, version: str, request: Request) -> dict[str, Any]:
    """Make a model local, and say where it is; an engine would load it from there."""
    try:
        path = request.app.state.models.get(name, version)
    except ObjectNotFoundError as error:
        raise HTTPException(404, str(error)) from error
    except ConfigError as error:
        raise HTTPException(400, str(error)) from error
    except ModelfsError as error:
        raise HTTPException(502, str(error)) from error
    return {"path": str(path), "files": sorted(one.name for one in path.iterdir() if one.is_file())}


@app.delete("/models/{name}/{version}")
def unload(name: str, version: str, request: Request) -> dict[str, bool]:
    """Give the disk space back."""
    try:
        return {"removed": request.app.state.models.evict(name, version)}
    except ConfigError as error:
        raise HTTPException(400, str(error)) from error


@app.get("/cache/stats")
def stats(request: Request) -> dict[str, Any]:
    """Say what is there, and how often it was."""
    return dataclasses.asdict(request.app.state.models.stats())
