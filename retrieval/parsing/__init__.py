"""One reader per format: bytes in, a `ParsedDocument` out; run in the parser's child process, never in the service."""
