"""Gateways: other people's ways to drive a microscope, each a client of our server.

Whatever comes through a gateway passes the server's role, lease, limits, dose ledger and audit like any command.
"""
