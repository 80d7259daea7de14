def write_card(folder, repo_id=None):
    return "kept"
