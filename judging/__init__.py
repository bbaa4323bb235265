"""The way to a judge: endpoints, requests, what was paid, offline stand-ins."""
