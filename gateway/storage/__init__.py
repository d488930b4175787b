"""Postgres, and only Postgres: the schema, its migrations, the job queue, and the server embedded for one machine.

The tables are described once, in `gateway.storage.schema`; statements on the way of a request are plain SQL through
psycopg, since building them anew would cost more than the round trip.
"""
