"""The HTTP server: the OpenAI protocol over one service that holds a base and all its customizations."""
