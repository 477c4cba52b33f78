"""A real server for the chat."""

import run_server

run_dir, server = run_server.run_dir, run_server.server
