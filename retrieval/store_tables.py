"""The tables of the document store's file, as they came to be.

The main rule: what stands here has run on somebody's file. A change is a further step at the end.
"""

from typing import Final

MIGRATIONS: Final = (
    """
    CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE documents (
        generation INTEGER PRIMARY KEY,
        id TEXT NOT NULL, tenant TEXT NOT NULL, name TEXT NOT NULL, version TEXT NOT NULL, media_type TEXT NOT NULL,
        title TEXT NOT NULL, length INTEGER NOT NULL, size_bytes INTEGER NOT NULL, passages INTEGER NOT NULL,
        pages INTEGER NOT NULL, index_version TEXT NOT NULL, metadata TEXT NOT NULL,
        created_at TEXT NOT NULL, updated_at TEXT NOT NULL,
        UNIQUE (tenant, id)
    );
    CREATE TABLE sources (generation INTEGER PRIMARY KEY, text_zlib BLOB NOT NULL);
    CREATE TABLE passages (
        generation INTEGER NOT NULL, n INTEGER NOT NULL, text TEXT NOT NULL, start INTEGER NOT NULL,
        "end" INTEGER NOT NULL, page INTEGER, heading_path TEXT NOT NULL,
        PRIMARY KEY (generation, n)
    ) WITHOUT ROWID;
    CREATE VIEW passage_rows AS
        SELECT p.generation, p.n, d.id, d.version, p.text, p.start, p."end", p.page, p.heading_path, d.name, d.title
        FROM passages p JOIN documents d ON d.generation = p.generation;
    CREATE TABLE tombstones (
        tenant TEXT NOT NULL, id TEXT NOT NULL, version TEXT NOT NULL, deleted_at TEXT NOT NULL
    );
    CREATE INDEX tombstones_of ON tombstones (tenant, id);
    """,
    """
    ALTER TABLE documents ADD COLUMN source TEXT NOT NULL DEFAULT '';
    CREATE INDEX documents_of_source ON documents (tenant, source) WHERE source != '';
    CREATE TABLE jobs (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL, kind TEXT NOT NULL, source TEXT NOT NULL,
        created_by TEXT NOT NULL, state TEXT NOT NULL, unchanged INTEGER NOT NULL,
        files_left INTEGER NOT NULL, deletions_left INTEGER NOT NULL, failed INTEGER NOT NULL,
        created_at TEXT NOT NULL, touched_at TEXT NOT NULL, finished_at TEXT
    );
    CREATE INDEX jobs_of ON jobs (tenant, number);
    CREATE INDEX jobs_open ON jobs (number) WHERE finished_at IS NULL;
    CREATE TABLE job_items (
        job INTEGER NOT NULL, n INTEGER NOT NULL,
        tenant TEXT NOT NULL, action TEXT NOT NULL, name TEXT NOT NULL, document_id TEXT NOT NULL,
        version TEXT NOT NULL, media_type TEXT, metadata TEXT NOT NULL, size_bytes INTEGER NOT NULL, spool TEXT,
        state TEXT NOT NULL, outcome TEXT, embedded INTEGER NOT NULL, reused INTEGER NOT NULL,
        error TEXT, message TEXT, attempts INTEGER NOT NULL, finished_at TEXT,
        PRIMARY KEY (job, n)
    ) WITHOUT ROWID;
    CREATE INDEX job_items_waiting ON job_items (n, job) WHERE state = 'waiting';
    CREATE INDEX job_items_open ON job_items (tenant, document_id) WHERE state IN ('waiting', 'running');
    CREATE INDEX job_items_named ON job_items (job, name);
    CREATE TABLE failures (
        tenant TEXT NOT NULL, document_id TEXT NOT NULL, name TEXT NOT NULL, source TEXT NOT NULL,
        version TEXT NOT NULL, error TEXT NOT NULL, message TEXT NOT NULL, job_id TEXT NOT NULL,
        failed_at TEXT NOT NULL,
        PRIMARY KEY (tenant, document_id)
    ) WITHOUT ROWID;
    """,
    """
    ALTER TABLE documents ADD COLUMN for_groups TEXT NOT NULL DEFAULT '[]';
    ALTER TABLE failures ADD COLUMN for_groups TEXT NOT NULL DEFAULT '[]';
    ALTER TABLE job_items ADD COLUMN for_groups TEXT NOT NULL DEFAULT '[]';
    ALTER TABLE job_items ADD COLUMN groups_of_writer TEXT NOT NULL DEFAULT 'null';
    """,
    """
    CREATE TABLE index_versions (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE, schema TEXT NOT NULL, state TEXT NOT NULL, comparison TEXT,
        created_at TEXT NOT NULL, ready_at TEXT, live_at TEXT, retired_at TEXT
    );
    CREATE TABLE cuts (
        index_number INTEGER NOT NULL, generation INTEGER NOT NULL, passages INTEGER NOT NULL,
        PRIMARY KEY (generation, index_number)
    ) WITHOUT ROWID;
    INSERT INTO cuts SELECT 1, generation, passages FROM documents;
    DROP VIEW passage_rows;
    ALTER TABLE passages RENAME TO old_passages;
    CREATE TABLE passages (
        generation INTEGER NOT NULL, index_number INTEGER NOT NULL, n INTEGER NOT NULL, text TEXT NOT NULL,
        start INTEGER NOT NULL, "end" INTEGER NOT NULL, page INTEGER, heading_path TEXT NOT NULL,
        PRIMARY KEY (generation, index_number, n)
    ) WITHOUT ROWID;
    INSERT INTO passages SELECT generation, 1, n, text, start, "end", page, heading_path FROM old_passages;
    DROP TABLE old_passages;
    CREATE VIEW passage_rows AS
        SELECT p.generation, p.n, d.id, d.version, p.text, p.start, p."end", p.page, p.heading_path, d.name, d.title,
            p.index_number
        FROM passages p JOIN documents d ON d.generation = p.generation;
    ALTER TABLE sources ADD COLUMN structure_zlib BLOB;
    """,
    """
    CREATE TABLE origins (
        tenant TEXT NOT NULL, document_id TEXT NOT NULL, origin TEXT NOT NULL, etag TEXT NOT NULL,
        version TEXT NOT NULL,
        PRIMARY KEY (tenant, document_id)
    ) WITHOUT ROWID;
    """,
    """
    CREATE INDEX job_items_running ON job_items (job) WHERE state = 'running';
    """,
)
