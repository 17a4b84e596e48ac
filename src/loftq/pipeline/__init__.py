"""The one engine: configuration, plan, streamed and resumable run."""
