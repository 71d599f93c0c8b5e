"""The tables of governance; see `store` for units.

A table that ends with `/* clustered */` is kept in its primary key's order where the database can do that (`sqlite`):
one page is written for a change instead of two.
"""

#: Who spends: organisations, teams, apps and keys form a tree; each is an account with its own limits.
ACCOUNTS = """
CREATE TABLE accounts (
    id TEXT PRIMARY KEY,
    kind TEXT NOT NULL CHECK (kind IN ('organisation', 'team', 'app', 'key')),
    parent TEXT REFERENCES accounts (id),
    name TEXT NOT NULL,
    hard_limit BIGINT CHECK (hard_limit >= 0),
    soft_limit BIGINT CHECK (soft_limit >= 0),
    period_ms BIGINT CHECK (period_ms > 0),
    period_start BIGINT NOT NULL,
    spent BIGINT NOT NULL DEFAULT 0 CHECK (spent >= 0),
    reserved BIGINT NOT NULL DEFAULT 0 CHECK (reserved >= 0),
    soft_reached_at BIGINT,
    requests_per_minute BIGINT CHECK (requests_per_minute >= 0),
    tokens_per_minute BIGINT CHECK (tokens_per_minute >= 0),
    created_at BIGINT NOT NULL,
    requests_at_once BIGINT CHECK (requests_at_once >= 0),
    under_way BIGINT NOT NULL DEFAULT 0
)"""
#: `hash` is SHA-256 of the key in hexadecimal; the key itself is nowhere.
KEYS = """
CREATE TABLE keys (
    id TEXT PRIMARY KEY REFERENCES accounts (id),
    hash TEXT NOT NULL UNIQUE,
    models TEXT,
    metadata TEXT NOT NULL,
    expires_at BIGINT,
    revoked_at BIGINT
)"""
#: One row per gateway process that may hold reservations.
WORKERS = "CREATE TABLE workers (id TEXT PRIMARY KEY, started_at BIGINT NOT NULL)"
#: One row per request under way, with what is charged should its process die. There are few: no other index.
RESERVATIONS = """
CREATE TABLE reservations (
    call TEXT PRIMARY KEY,
    worker TEXT NOT NULL,
    amount BIGINT NOT NULL,
    prompt_bound BIGINT NOT NULL,
    completion_bound BIGINT NOT NULL,
    chain TEXT NOT NULL,
    request_id TEXT NOT NULL,
    model TEXT NOT NULL,
    tier TEXT NOT NULL,
    started_at BIGINT NOT NULL
) /* clustered */"""
#: What an account used in one second, for sliding windows; tokens are reserved ones until the request ended.
WINDOWS = """
CREATE TABLE windows (
    account TEXT NOT NULL,
    second BIGINT NOT NULL,
    requests BIGINT NOT NULL,
    tokens BIGINT NOT NULL,
    PRIMARY KEY (account, second)
) /* clustered */"""
#: One row per request that has ended, of the kind `answer`, with what the call cost whose answer the client got; one
#: more for every other call that cost something, by its kind (`budgets.Part`), with its own backend, tokens, cost and
#: status, no attempts, and all else like the request's. So sums by whatever column agree, and requests are the rows of
#: the kind `answer`. `exact`: the backend counted the tokens; otherwise they are what was seen or bounds. `cost` is
#: what was charged, `excess` what the calls cost above the reservation: nobody is charged for it. Draft tokens were
#: guessed before the model made them, by a draft model or the client, as far as the backend says so; those accepted are
#: among the completion's.
LEDGER = """
CREATE TABLE ledger (
    call TEXT PRIMARY KEY,
    request_id TEXT NOT NULL,
    key_id TEXT NOT NULL,
    app TEXT,
    team TEXT,
    organisation TEXT,
    tier TEXT NOT NULL,
    backend TEXT NOT NULL,
    model TEXT NOT NULL,
    prompt_tokens BIGINT NOT NULL,
    cached_tokens BIGINT NOT NULL,
    completion_tokens BIGINT NOT NULL,
    exact INTEGER NOT NULL,
    cost BIGINT NOT NULL,
    excess BIGINT NOT NULL,
    outcome TEXT NOT NULL,
    status INTEGER NOT NULL,
    attempts INTEGER NOT NULL,
    started_at BIGINT NOT NULL,
    ended_at BIGINT NOT NULL,
    kind TEXT NOT NULL DEFAULT 'answer',
    accepted_draft_tokens BIGINT NOT NULL DEFAULT 0,
    rejected_draft_tokens BIGINT NOT NULL DEFAULT 0
)"""
#: Every change by an administrator and every rule that took effect; each row's hash covers the row before it.
AUDIT = """
CREATE TABLE audit (
    sequence BIGINT PRIMARY KEY,
    at BIGINT NOT NULL,
    actor TEXT NOT NULL,
    action TEXT NOT NULL,
    subject TEXT NOT NULL,
    details TEXT NOT NULL,
    hash TEXT NOT NULL
)"""
#: The last row of the trail, so that rows cut off its end are missed; and how many rows are decisions of policies: the
#: others tell of changes.
AUDIT_HEAD = """
CREATE TABLE audit_head (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    sequence BIGINT NOT NULL,
    hash TEXT NOT NULL,
    decisions BIGINT NOT NULL DEFAULT 0
)"""
#: Which backend keeps a response, and whose it is, by the hash of its id, numbered as they came (`register`).
RESPONSES = """
CREATE TABLE responses (
    id TEXT PRIMARY KEY,
    number BIGINT NOT NULL,
    owner TEXT NOT NULL,
    backend TEXT NOT NULL,
    server TEXT NOT NULL,
    at BIGINT NOT NULL
)"""

SCHEMA = (
    ACCOUNTS,
    "CREATE INDEX accounts_by_parent ON accounts (parent)",
    KEYS,
    WORKERS,
    RESERVATIONS,
    WINDOWS,
    LEDGER,
    "CREATE INDEX ledger_by_end ON ledger (ended_at)",
    "CREATE INDEX ledger_by_key ON ledger (key_id, ended_at)",
    AUDIT,
    AUDIT_HEAD,
    RESPONSES,
    "CREATE INDEX responses_by_number ON responses (number)",
)
