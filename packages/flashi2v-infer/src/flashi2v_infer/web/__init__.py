"""The same in a browser, and by HTTP.

`jobs` is a queue on disk; `workers` keeps one process per device, which is `worker`, and samples what is queued by the
library's own commands; `schema` says what a client may ask for, `gate` who may ask; `server` speaks OpenAI's
`/v1/videos`, `page` is what a browser shows, `running` puts them together. `cli` is the command `flashi2v-web`.
"""
