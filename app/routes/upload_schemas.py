"""Documents as they are uploaded: as JSON, and as a form with a file."""

from pydantic import ConfigDict, Field

from app.routes.schemas import GROUPS_MEANING, Fact, Groups, Key, Name, Wire

ETAG = "With `job`: what its source calls these bytes, such as an object's ETag or a Git blob's id."

METADATA = "Facts that a search can filter by; without it a document keeps those it has."


class DocumentUpload(Wire):
    """A document as JSON: its text, its bytes in base64, or the URL it is at."""

    name: Name | None = Field(None, description="Name or path; the same name again replaces it. By default the URL.")
    text: str | None = Field(None, description="The document, when it is text.")
    content_base64: str | None = Field(None, description="The document's bytes, when it is not.")
    url: str | None = Field(None, max_length=2_000, description="Where to fetch it, if the service's settings allow.")
    media_type: str | None = Field(None, max_length=128, description="By default told from the name and the bytes.")
    metadata: dict[Key, Fact] | None = Field(None, max_length=32, description=METADATA)
    groups: Groups | None = None
    etag: str | None = Field(None, max_length=256, description=ETAG)


class DocumentFile(Wire):
    """A document as a form upload."""

    model_config = ConfigDict(extra="ignore")

    file: bytes = Field(json_schema_extra={"format": "binary"})
    name: str = Field("", max_length=512, description="By default the file's own name.")
    metadata: str = Field("", description=f"A JSON object. {METADATA}")
    groups: str = Field("", description=f"A JSON array. {GROUPS_MEANING}")
    etag: str = Field("", max_length=256, description=ETAG)
