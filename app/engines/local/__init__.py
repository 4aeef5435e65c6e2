"""The embedded engine: its own process, which serves a small real model by TGI's protocol on CPU."""
