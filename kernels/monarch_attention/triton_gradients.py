"""Triton kernels of the backward pass of monarch_attention, for one iteration.

`right_kernel` of the forward pass computes `a_l`, `y` and `c_l` again (names, lines and key rows as in
`triton_forward.py`). With g the gradient of the output, `scale` s, and logarithms to base e:

    delta = <g, out>            L = exp(s q a_l - c_l - lse)         dU = L (g y - delta)
    da = s sum_i dU q           dy = sum_i L g                       dc = -sum_i dU
    e = <da, a_l> + <dy, y> + dc c_l
    dz = R (da K + dy V + dc log R - e)
    dq = s sum_(f,k) dU a_l + s sum_(f,l) dz K
    dk = s sum_(a,j) dz q + sum_(a,j) R da                           dv = sum_(a,j) R dy

`left_gradient_kernel` computes the first three lines and the first part of dq, `right_gradient_kernel` dz, dk and dv,
and `query_gradient_kernel` the second part of dq. da, dy and e overwrite `a_l`, `y` and `c_l`. No two programs write to
the same place, so that two runs agree bit for bit.
"""

from __future__ import annotations

from hf_efficient.kernels.monarch_attention.triton_forward import attended, inner_offset, load_tokens, tile_offset
from hf_efficient.kernels.triton_language import HAVE_TRITON, tl, triton

if HAVE_TRITON:

    @triton.jit
    def load_rows(source, row, inside, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
        """Rows [M] of a contiguous [rows, HEAD_DIM], [M, BLOCK_D]; zeros where not inside.

        Rows in 32 bits need fewer registers; `source` then already points near them.
        """
        offs_d = tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (offs_d < HEAD_DIM)[None, :]
        return tl.load(source + row[:, None] * HEAD_DIM + offs_d[None, :], mask=mask, other=0.0)

    @triton.jit
    def store_rows(target, row, inside, value, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
        """Write `value` [M, BLOCK_D] to rows [M] of a contiguous [rows, HEAD_DIM]."""
        offs_d = tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (offs_d < HEAD_DIM)[None, :]
        ptrs = target + row[:, None] * HEAD_DIM + offs_d[None, :]
        tl.store(ptrs, value.to(target.dtype.element_ty), mask=mask)

    @triton.jit
    def probability_gradients(q_tile, g_tile, a_tile, y_tile, c_i, lse_i, delta_i, qk_scale):
        """L and dU of some key rows and queries, both [N, M], and the term e of each key row without the entropy's.

        <da, a_l> + <dy, y> is the sum of dU u + L (g y) over the queries, which are fewer than the head_dim.
        """
        u = tl.dot(a_tile, tl.trans(q_tile), input_precision="ieee") * qk_scale
        # 0 for queries that take part in nothing, whose lse is +inf, and for key rows without a valid key: c is +inf.
        p = tl.exp2(u - c_i[:, None] - lse_i[None, :])
        dp = tl.dot(y_tile, tl.trans(g_tile), input_precision="ieee")
        du = p * (dp - delta_i[None, :])
        return p, du, tl.sum(du * u * 0.6931471805599453 + p * dp, axis=1)

    @triton.jit
    def entropy_term(dc_i, c_i):
        """The part of e that comes from the entropy, [N]; c is to base 2."""
        return dc_i * tl.where(c_i == float("inf"), 0.0, c_i) * 0.6931471805599453

    # Grid (lines * blocks of b1, G): a program holds BLOCK_M query rows of one line and passes over the key rows. With
    # SUMMARIES these are all rows of the line, and it writes da, dy, dc and e too; otherwise it writes delta for
    # `summary_gradient_kernel`.
    @triton.jit(do_not_specialize=["first_group", "query_tokens", "key_tiles", "query_tiles"])
    def left_gradient_kernel(
        dq_part,
        dc,
        delta,
        dout,
        q,
        out,
        a_l,
        y,
        c_l,
        lse,
        key_mask,
        first_group,
        heads,
        query_tokens,
        scale,
        qk_scale,
        q_stride_b,
        q_stride_h,
        q_stride_n,
        mask_stride_b,
        query_tiles,
        key_tiles,
        rows,
        columns,
        tiles_h,
        tiles_w,
        tile_stride_f,
        tile_stride_h,
        tile_stride_w,
        row_inner,
        row_stride_outer,
        row_stride_inner,
        column_inner,
        column_stride_outer,
        column_stride_inner,
        shift,
        causal_tiles,
        HEAD_DIM: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        IS_SEQUENCE: tl.constexpr,
        HAS_MASK: tl.constexpr,
        SUMMARIES: tl.constexpr,
        NUM_STAGES: tl.constexpr,
    ):
        lines = query_tiles * columns
        key_rows = key_tiles * rows
        blocks_m = tl.cdiv(rows, BLOCK_M)
        line = tl.program_id(0) // blocks_m
        group = tl.program_id(1).to(tl.int64)
        head = (first_group + group) % heads
        batch = (first_group + group) // heads
        if HAS_MASK:
            key_mask += batch * mask_stride_b
        row = tl.program_id(0) % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)
        query_tile = line // columns
        token = shift + tile_offset(query_tile, tiles_h, tiles_w, tile_stride_f, tile_stride_h, tile_stride_w)
        token += inner_offset(line % columns, column_inner, column_stride_outer, column_stride_inner)
        token += inner_offset(row, row_inner, row_stride_outer, row_stride_inner)
        valid = attended(key_mask, token, query_tokens, row < rows, IS_SEQUENCE, HAS_MASK)
        q_base = q + batch * q_stride_b + head * q_stride_h
        q_tile = load_tokens(q_base, token, valid, q_stride_n, HEAD_DIM, BLOCK_D)
        out_row = (batch * query_tokens + token) * heads + head
        g_tile = load_rows(dout, out_row, valid, HEAD_DIM, BLOCK_D)
        out_tile = load_rows(out, out_row, valid, HEAD_DIM, BLOCK_D)
        delta_i = tl.sum(g_tile.to(tl.float32) * out_tile.to(tl.float32), axis=1)
        query_row = (group * lines + line) * rows + row
        lse_i = tl.load(lse + query_row, mask=row < rows, other=float("inf"))
        if not SUMMARIES:
            tl.store(delta + query_row, delta_i, mask=row < rows)

        end_row = key_rows
        if causal_tiles > 0:
            end_row = (query_tile // causal_tiles + 1) * causal_tiles * rows
        first = (group * lines + line) * key_rows
        a_l += first * HEAD_DIM
        y += first * HEAD_DIM
        c_l += first
        dc += first
        # Transposed, [BLOCK_D, BLOCK_M]: the tensor cores' tile has at least 64 rows, more than many tiles have.
        dq_acc = tl.zeros([BLOCK_D, BLOCK_M], dtype=tl.float32)
        for start_n in tl.range(0, end_row, BLOCK_N, num_stages=NUM_STAGES):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            inside = offs_n < end_row
            a_tile = load_rows(a_l, offs_n, inside, HEAD_DIM, BLOCK_D)
            y_tile = load_rows(y, offs_n, inside, HEAD_DIM, BLOCK_D)
            c_i = tl.load(c_l + offs_n, mask=inside, other=float("inf"))
            p, du, e_i = probability_gradients(q_tile, g_tile, a_tile, y_tile, c_i, lse_i, delta_i, qk_scale)
            du_half = du.to(q_tile.dtype)
            dq_acc = tl.dot(tl.trans(a_tile), du_half, dq_acc, input_precision="ieee")
            if SUMMARIES:
                dc_i = -tl.sum(du, axis=1)
                tl.store(dc + offs_n, dc_i, mask=inside)
                tl.store(c_l + offs_n, e_i + entropy_term(dc_i, c_i), mask=inside)
                da = tl.dot(du_half, q_tile, input_precision="ieee") * scale
                store_rows(a_l, offs_n, inside, da, HEAD_DIM, BLOCK_D)
                dy = tl.dot(p.to(g_tile.dtype), g_tile, input_precision="ieee")
                store_rows(y, offs_n, inside, dy, HEAD_DIM, BLOCK_D)
        store_rows(dq_part, query_row, row < rows, tl.trans(dq_acc) * scale, HEAD_DIM, BLOCK_D)

    # Grid (lines * blocks of key rows, G): da, dy, dc and e of BLOCK_N key rows of a line; passes over its query rows.
    @triton.jit(do_not_specialize=["first_group", "query_tokens", "key_tiles", "query_tiles"])
    def summary_gradient_kernel(
        dc,
        delta,
        dout,
        q,
        a_l,
        y,
        c_l,
        lse,
        key_mask,
        first_group,
        heads,
        query_tokens,
        scale,
        qk_scale,
        q_stride_b,
        q_stride_h,
        q_stride_n,
        mask_stride_b,
        query_tiles,
        key_tiles,
        rows,
        columns,
        tiles_h,
        tiles_w,
        tile_stride_f,
        tile_stride_h,
        tile_stride_w,
        row_inner,
        row_stride_outer,
        row_stride_inner,
        column_inner,
        column_stride_outer,
        column_stride_inner,
        shift,
        causal_tiles,
        HEAD_DIM: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        IS_SEQUENCE: tl.constexpr,
        HAS_MASK: tl.constexpr,
        NUM_STAGES: tl.constexpr,
    ):
        lines = query_tiles * columns
        key_rows = key_tiles * rows
        blocks_n = tl.cdiv(key_rows, BLOCK_N)
        line = tl.program_id(0) // blocks_n
        group = tl.program_id(1).to(tl.int64)
        head = (first_group + group) % heads
        batch = (first_group + group) // heads
        if HAS_MASK:
            key_mask += batch * mask_stride_b
        query_tile = line // columns
        line_token = shift + tile_offset(query_tile, tiles_h, tiles_w, tile_stride_f, tile_stride_h, tile_stride_w)
        line_token += inner_offset(line % columns, column_inner, column_stride_outer, column_stride_inner)
        q_base = q + batch * q_stride_b + head * q_stride_h
        end_row = key_rows
        if causal_tiles > 0:
            end_row = (query_tile // causal_tiles + 1) * causal_tiles * rows
        offs_n = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = offs_n < end_row
        key_row = (group * lines + line) * key_rows + offs_n
        a_tile = load_rows(a_l, key_row, inside, HEAD_DIM, BLOCK_D)
        y_tile = load_rows(y, key_row, inside, HEAD_DIM, BLOCK_D)
        c_i = tl.load(c_l + key_row, mask=inside, other=float("inf"))
        da = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
        dy = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
        dc_i = tl.zeros([BLOCK_N], dtype=tl.float32)
        e_i = tl.zeros([BLOCK_N], dtype=tl.float32)
        for start_m in tl.range(0, rows, BLOCK_M, num_stages=NUM_STAGES):
            row = start_m + tl.arange(0, BLOCK_M)
            token = line_token + inner_offset(row, row_inner, row_stride_outer, row_stride_inner)
            valid = attended(key_mask, token, query_tokens, row < rows, IS_SEQUENCE, HAS_MASK)
            q_tile = load_tokens(q_base, token, valid, q_stride_n, HEAD_DIM, BLOCK_D)
            g_tile = load_rows(dout, (batch * query_tokens + token) * heads + head, valid, HEAD_DIM, BLOCK_D)
            query_row = (group * lines + line) * rows + row
            lse_i = tl.load(lse + query_row, mask=row < rows, other=float("inf"))
            delta_i = tl.load(delta + query_row, mask=row < rows, other=0.0)
            p, du, e_part = probability_gradients(q_tile, g_tile, a_tile, y_tile, c_i, lse_i, delta_i, qk_scale)
            da = tl.dot(du.to(q_tile.dtype), q_tile, da, input_precision="ieee")
            dy = tl.dot(p.to(g_tile.dtype), g_tile, dy, input_precision="ieee")
            dc_i -= tl.sum(du, axis=1)
            e_i += e_part
        e_i += entropy_term(dc_i, c_i)
        store_rows(a_l, key_row, inside, da * scale, HEAD_DIM, BLOCK_D)
        store_rows(y, key_row, inside, dy, HEAD_DIM, BLOCK_D)
        tl.store(dc + key_row, dc_i, mask=inside)
        tl.store(c_l + key_row, e_i, mask=inside)

    # Grid (b1 * Tf * blocks of b2, G): a program holds BLOCK_L keys of one key row and passes over the lines.
    @triton.jit(do_not_specialize=["first_group", "query_tokens", "key_tokens", "key_tiles", "query_tiles"])
    def right_gradient_kernel(
        dk,
        dv,
        dz,
        q,
        k,
        v,
        da,
        dy,
        dc,
        e,
        lse_r,
        key_mask,
        pad_query,
        first_group,
        heads,
        query_tokens,
        key_tokens,
        scale,
        qk_scale,
        q_stride_b,
        q_stride_h,
        q_stride_n,
        k_stride_b,
        k_stride_h,
        k_stride_n,
        v_stride_b,
        v_stride_h,
        v_stride_n,
        dk_stride_b,
        dk_stride_h,
        dk_stride_n,
        dv_stride_b,
        dv_stride_h,
        dv_stride_n,
        mask_stride_b,
        query_tiles,
        key_tiles,
        rows,
        columns,
        tiles_h,
        tiles_w,
        tile_stride_f,
        tile_stride_h,
        tile_stride_w,
        row_inner,
        row_stride_outer,
        row_stride_inner,
        column_inner,
        column_stride_outer,
        column_stride_inner,
        shift,
        causal_tiles,
        dz_lines,
        HEAD_DIM: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_L: tl.constexpr,
        IS_SEQUENCE: tl.constexpr,
        HAS_MASK: tl.constexpr,
        PAD_MEAN: tl.constexpr,
        NUM_STAGES: tl.constexpr,
    ):
        lines = query_tiles * columns
        key_rows = key_tiles * rows
        blocks_l = tl.cdiv(columns, BLOCK_L)
        offs_l = tl.program_id(0) % blocks_l * BLOCK_L + tl.arange(0, BLOCK_L)
        key_tile = tl.program_id(0) // blocks_l % key_tiles
        row = tl.program_id(0) // blocks_l // key_tiles
        key_row = key_tile * rows + row
        group = tl.program_id(1).to(tl.int64)
        head = (first_group + group) % heads
        batch = (first_group + group) // heads
        if HAS_MASK:
            key_mask += batch * mask_stride_b
        row_offset = shift + inner_offset(row, row_inner, row_stride_outer, row_stride_inner)
        start = row_offset + tile_offset(key_tile, tiles_h, tiles_w, tile_stride_f, tile_stride_h, tile_stride_w)
        token = start + inner_offset(offs_l, column_inner, column_stride_outer, column_stride_inner)
        present = attended(key_mask, token, key_tokens, offs_l < columns, IS_SEQUENCE, False)
        valid = attended(key_mask, token, key_tokens, offs_l < columns, IS_SEQUENCE, HAS_MASK)
        k_base = k + batch * k_stride_b + head * k_stride_h
        k_tile = load_tokens(k_base, token, valid, k_stride_n, HEAD_DIM, BLOCK_D)
        v_tile = load_tokens(v + batch * v_stride_b + head * v_stride_h, token, valid, v_stride_n, HEAD_DIM, BLOCK_D)
        q_base = q + batch * q_stride_b + head * q_stride_h
        offs_d = tl.arange(0, BLOCK_D)
        dk_acc = tl.zeros([BLOCK_L, BLOCK_D], dtype=tl.float32)
        dv_acc = tl.zeros([BLOCK_L, BLOCK_D], dtype=tl.float32)
        first_line = 0
        if causal_tiles > 0:
            # Earlier chunks do not see this one.
            first_line = key_tile // causal_tiles * causal_tiles * columns
        for start_line in tl.range(first_line, lines, BLOCK_M, num_stages=NUM_STAGES):
            line = start_line + tl.arange(0, BLOCK_M)
            inside = line < lines
            column = line % columns
            q_token = row_offset + inner_offset(column, column_inner, column_stride_outer, column_stride_inner)
            q_token += tile_offset(line // columns, tiles_h, tiles_w, tile_stride_f, tile_stride_h, tile_stride_w)
            q_valid = attended(key_mask, q_token, query_tokens, inside, IS_SEQUENCE, HAS_MASK)
            q_tile = load_tokens(q_base, q_token, q_valid, q_stride_n, HEAD_DIM, BLOCK_D)
            if PAD_MEAN:
                mean = load_rows(pad_query, group * columns + column, inside & ~q_valid, HEAD_DIM, BLOCK_D)
                q_tile = tl.where(q_valid[:, None], q_tile, mean)
            # Lines are `key_rows` rows apart.
            first_summary = (group * lines + start_line) * key_rows + key_row
            summary = tl.arange(0, BLOCK_M) * key_rows
            da_tile = load_rows(da + first_summary * HEAD_DIM, summary, inside, HEAD_DIM, BLOCK_D)
            dy_tile = load_rows(dy + first_summary * HEAD_DIM, summary, inside, HEAD_DIM, BLOCK_D)
            dc_i = tl.load(dc + first_summary + summary, mask=inside, other=0.0) * 0.6931471805599453
            e_i = tl.load(e + first_summary + summary, mask=inside, other=0.0)
            lse_i = tl.load(lse_r + first_summary + summary, mask=inside, other=float("inf"))
            log_r = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee") * qk_scale - lse_i[None, :]
            r = tl.where(valid[:, None], tl.exp2(log_r), 0.0)
            dr = tl.dot(k_tile, tl.trans(da_tile), input_precision="ieee")
            dr = tl.dot(v_tile, tl.trans(dy_tile), dr, input_precision="ieee")
            dr += dc_i[None, :] * log_r - e_i[None, :]
            # Where R is 0 its logarithm may be -inf.
            dz_tile = tl.where(r > 0.0, r * dr * scale, 0.0).to(q_tile.dtype)
            dz_row = ((group * rows + row) * key_tiles + key_tile) * columns + offs_l
            ptrs = dz + dz_row[:, None] * dz_lines + line[None, :]
            tl.store(ptrs, dz_tile, mask=(offs_l < columns)[:, None] & inside[None, :])
            r_half = r.to(q_tile.dtype)
            dk_acc = tl.dot(dz_tile, q_tile, dk_acc, input_precision="ieee")
            dk_acc = tl.dot(r_half, da_tile, dk_acc, input_precision="ieee")
            dv_acc = tl.dot(r_half, dy_tile, dv_acc, input_precision="ieee")
        mask = present[:, None] & (offs_d < HEAD_DIM)[None, :]
        dk_ptrs = dk + batch * dk_stride_b + head * dk_stride_h + token.to(tl.int64)[:, None] * dk_stride_n
        dv_ptrs = dv + batch * dv_stride_b + head * dv_stride_h + token.to(tl.int64)[:, None] * dv_stride_n
        tl.store(dk_ptrs + offs_d[None, :], dk_acc.to(dk.dtype.element_ty), mask=mask)
        tl.store(dv_ptrs + offs_d[None, :], dv_acc.to(dv.dtype.element_ty), mask=mask)

    # Grid (blocks of lines * b1, G): a program holds BLOCK_M lines of one row and passes over the keys of that row in
    # every key tile. It adds to `dq_part`; with PAD_MEAN the sum stays there, for `_share_means`.
    @triton.jit(do_not_specialize=["first_group", "query_tokens", "key_tokens", "key_tiles", "query_tiles"])
    def query_gradient_kernel(
        dq,
        dq_part,
        dz,
        k,
        key_mask,
        first_group,
        heads,
        query_tokens,
        key_tokens,
        k_stride_b,
        k_stride_h,
        k_stride_n,
        dq_stride_b,
        dq_stride_h,
        dq_stride_n,
        mask_stride_b,
        query_tiles,
        key_tiles,
        rows,
        columns,
        tiles_h,
        tiles_w,
        tile_stride_f,
        tile_stride_h,
        tile_stride_w,
        row_inner,
        row_stride_outer,
        row_stride_inner,
        column_inner,
        column_stride_outer,
        column_stride_inner,
        shift,
        causal_tiles,
        dz_lines,
        HEAD_DIM: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_L: tl.constexpr,
        IS_SEQUENCE: tl.constexpr,
        HAS_MASK: tl.constexpr,
        PAD_MEAN: tl.constexpr,
        NUM_STAGES: tl.constexpr,
    ):
        lines = query_tiles * columns
        blocks_m = tl.cdiv(lines, BLOCK_M)
        start_line = tl.program_id(0) % blocks_m * BLOCK_M
        row = tl.program_id(0) // blocks_m
        group = tl.program_id(1).to(tl.int64)
        head = (first_group + group) % heads
        batch = (first_group + group) // heads
        if HAS_MASK:
            key_mask += batch * mask_stride_b
        line = start_line + tl.arange(0, BLOCK_M)
        query_tile = line // columns
        row_offset = shift + inner_offset(row, row_inner, row_stride_outer, row_stride_inner)
        token = row_offset + inner_offset(line % columns, column_inner, column_stride_outer, column_stride_inner)
        token += tile_offset(query_tile, tiles_h, tiles_w, tile_stride_f, tile_stride_h, tile_stride_w)
        present = attended(key_mask, token, query_tokens, line < lines, IS_SEQUENCE, False)
        valid = attended(key_mask, token, query_tokens, line < lines, IS_SEQUENCE, HAS_MASK)
        end_tile = key_tiles
        own_end = tl.full([BLOCK_M], 0, dtype=tl.int32) + key_tiles
        if causal_tiles > 0:
            last_tile = tl.minimum(start_line + BLOCK_M - 1, lines - 1) // columns
            end_tile = (last_tile // causal_tiles + 1) * causal_tiles
            own_end = (query_tile // causal_tiles + 1) * causal_tiles
        k_base = k + batch * k_stride_b + head * k_stride_h
        first_key_row = (group * rows + row) * key_tiles
        offs_d = tl.arange(0, BLOCK_D)
        acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        blocks_l = tl.cdiv(columns, BLOCK_L)
        for index in tl.range(0, end_tile * blocks_l, num_stages=NUM_STAGES):
            key_tile = index // blocks_l
            offs_l = index % blocks_l * BLOCK_L + tl.arange(0, BLOCK_L)
            key = row_offset + tile_offset(key_tile, tiles_h, tiles_w, tile_stride_f, tile_stride_h, tile_stride_w)
            key += inner_offset(offs_l, column_inner, column_stride_outer, column_stride_inner)
            key_valid = attended(key_mask, key, key_tokens, offs_l < columns, IS_SEQUENCE, HAS_MASK)
            k_tile = load_tokens(k_base, key, key_valid, k_stride_n, HEAD_DIM, BLOCK_D)
            written = (offs_l < columns)[:, None] & ((line < lines) & (key_tile < own_end))[None, :]
            ptrs = dz + (first_key_row + key_tile) * columns * dz_lines + offs_l[:, None] * dz_lines + line[None, :]
            dz_tile = tl.load(ptrs, mask=written, other=0.0)
            acc = tl.dot(tl.trans(dz_tile), k_tile, acc, input_precision="ieee")
        query_row = (group * lines + line) * rows + row
        total = acc + load_rows(dq_part, query_row, line < lines, HEAD_DIM, BLOCK_D)
        if PAD_MEAN:
            store_rows(dq_part, query_row, line < lines, total, HEAD_DIM, BLOCK_D)
        else:
            total = tl.where(valid[:, None], total, 0.0)
            ptrs = dq + batch * dq_stride_b + head * dq_stride_h + token.to(tl.int64)[:, None] * dq_stride_n
            mask = present[:, None] & (offs_d < HEAD_DIM)[None, :]
            tl.store(ptrs + offs_d[None, :], total.to(dq.dtype.element_ty), mask=mask)

else:
    # The file of the launcher imports these names, and must load without Triton.
    left_gradient_kernel = summary_gradient_kernel = right_gradient_kernel = query_gradient_kernel = None
