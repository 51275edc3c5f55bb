from .config import FilterConfig as FilterConfig
from .filter import count_files as count_files, explain_path as explain_path, filter_files as filter_files
from .folder import Folder as Folder, read_folder as read_folder, write_meta as write_meta
from .inspection import describe_store as describe_store, inspect_store as inspect_store, plot_store as plot_store
from .meta import read_entries as read_entries
from .report import FilterReport as FilterReport
from .stream import filter_records as filter_records
