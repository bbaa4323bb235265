"""Access to judges: endpoints, requests, the record of calls and cost, an offline judge."""
