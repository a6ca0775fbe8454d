/* A libibverbs of two devices that are not there, for tests of what looks at
 * devices: "fake_0", InfiniBand, knows dmabufs; "fake_1", Ethernet with two
 * ports, the second down, is of the old ABI without an extended context.
 *
 * Ends the process where an object is freed before what was made of it, and
 * makes the exit status 99 where one is never freed. */
#include <infiniband/verbs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#undef ibv_get_device_list
#undef ibv_query_port
#undef ibv_reg_mr

static struct ibv_device devices[2] = {
    {.node_type = IBV_NODE_CA, .transport_type = IBV_TRANSPORT_IB, .name = "fake_0"},
    {.node_type = IBV_NODE_CA, .transport_type = IBV_TRANSPORT_IB, .name = "fake_1"},
};
static _Atomic int lists, contexts, domains, regions;

/* Each counts what was made of it. */
struct fake_context {
    _Atomic int domains;
    struct verbs_context whole;
};
struct fake_pd {
    struct ibv_pd pd;
    _Atomic int regions;
};

static struct fake_context *outer(struct ibv_context *context) {
    return (void *)((char *)context - offsetof(struct fake_context, whole.context));
}

static void demand(int truth, const char *what) {
    if (truth) return;
    fprintf(stderr, "fake libibverbs: %s\n", what);
    abort();
}

__attribute__((destructor)) static void at_exit(void) {
    if (!lists && !contexts && !domains && !regions) return;
    fprintf(stderr, "fake libibverbs: left: %d lists, %d contexts, %d domains, %d regions\n", lists, contexts, domains,
            regions);
    _exit(99);
}

static int is_old(struct ibv_context *context) { return context->device == &devices[1]; }

struct ibv_device **ibv_get_device_list(int *count) {
    if (getenv("FAKE_VERBS_NO_KERNEL")) {
        errno = ENOSYS;
        return NULL;
    }
    struct ibv_device **list = calloc(3, sizeof *list);
    list[0] = &devices[0];
    list[1] = &devices[1];
    *count = 2;
    lists++;
    return list;
}

void ibv_free_device_list(struct ibv_device **list) {
    lists--;
    free(list);
}

const char *ibv_get_device_name(struct ibv_device *device) { return device->name; }

static int fill_port(struct ibv_context *context, uint8_t port, struct ibv_port_attr *attr) {
    if (port < 1 || port > (is_old(context) ? 2 : 1)) return EINVAL;
    attr->state = port == 1 ? IBV_PORT_ACTIVE : IBV_PORT_DOWN;
    attr->max_mtu = IBV_MTU_4096;
    attr->active_mtu = is_old(context) ? IBV_MTU_1024 : IBV_MTU_4096;
    attr->gid_tbl_len = is_old(context) ? 300 : 4;
    attr->lid = is_old(context) ? 0 : 17;
    attr->link_layer = is_old(context) ? IBV_LINK_LAYER_ETHERNET : IBV_LINK_LAYER_INFINIBAND;
    return 0;
}

int ibv_query_port(struct ibv_context *context, uint8_t port, struct _compat_ibv_port_attr *attr) {
    demand(is_old(context), "the old query_port, though the context has the new");
    return fill_port(context, port, (struct ibv_port_attr *)attr);
}

static int query_port(struct ibv_context *context, uint8_t port, struct ibv_port_attr *attr, size_t size) {
    demand(size >= offsetof(struct ibv_port_attr, port_cap_flags2), "query_port with a short struct");
    return fill_port(context, port, attr);
}

struct ibv_context *ibv_open_device(struct ibv_device *device) {
    struct verbs_context *whole = &((struct fake_context *)calloc(1, sizeof(struct fake_context)))->whole;
    whole->sz = sizeof *whole;
    whole->query_port = query_port;
    whole->context.device = device;
    whole->context.abi_compat = is_old(&whole->context) ? NULL : __VERBS_ABI_IS_EXTENDED;
    contexts++;
    return &whole->context;
}

int ibv_close_device(struct ibv_context *context) {
    demand(!outer(context)->domains, "a device closed before its domains");
    contexts--;
    free(outer(context));
    return 0;
}

int ibv_query_device(struct ibv_context *context, struct ibv_device_attr *attr) {
    memset(attr, 0, sizeof *attr);
    attr->phys_port_cnt = is_old(context) ? 2 : 1;
    attr->max_qp_wr = 8192;
    return 0;
}

/* fake_0 answers for itself; fake_1 has neither this nor types of its own, so
 * that sysfs is asked. */
int _ibv_query_gid_ex(struct ibv_context *context, uint32_t port, uint32_t index, struct ibv_gid_entry *entry,
                      uint32_t flags, size_t size) {
    demand(size == sizeof *entry && flags == 0, "query_gid_ex with other arguments");
    if (is_old(context)) return EOPNOTSUPP;
    if (index > 0) return ENODATA;
    memset(entry, 0, size);
    entry->gid.raw[0] = 0xfe, entry->gid.raw[1] = 0x80, entry->gid.raw[15] = 1;
    entry->gid_type = IBV_GID_TYPE_IB;
    return 0;
}

/* Index 0 and 255: 10.0.0.port; the others are empty. */
int ibv_query_gid(struct ibv_context *context, uint8_t port, int index, union ibv_gid *gid) {
    memset(gid, 0, sizeof *gid);
    demand(index < 256, "a GID that a queue pair cannot name");
    if (index == 0 || index == 255) {
        gid->raw[10] = gid->raw[11] = 0xff;
        gid->raw[12] = 10, gid->raw[15] = port;
    }
    return 0;
}

struct ibv_pd *ibv_alloc_pd(struct ibv_context *context) {
    struct ibv_pd *pd = calloc(1, sizeof(struct fake_pd));
    pd->context = context;
    outer(context)->domains++;
    domains++;
    return pd;
}

int ibv_dealloc_pd(struct ibv_pd *pd) {
    demand(!((struct fake_pd *)pd)->regions, "a domain freed before its regions");
    outer(pd->context)->domains--;
    domains--;
    free(pd);
    return 0;
}

struct ibv_mr *ibv_reg_mr_iova2(struct ibv_pd *pd, void *addr, size_t length, uint64_t iova, unsigned int access) {
    demand(access & IBV_ACCESS_RELAXED_ORDERING, "a registration without relaxed ordering");
    demand(iova == (uintptr_t)addr, "a registration under another address");
    if (length > 1 << 20) {
        errno = ENOMEM;
        return NULL;
    }
    struct ibv_mr *mr = calloc(1, sizeof *mr);
    mr->context = pd->context, mr->pd = pd, mr->addr = addr, mr->length = length;
    mr->lkey = 7;
    mr->rkey = access & IBV_ACCESS_REMOTE_WRITE ? 8 : 0;
    ((struct fake_pd *)pd)->regions++;
    regions++;
    return mr;
}

struct ibv_mr *ibv_reg_dmabuf_mr(struct ibv_pd *pd, uint64_t offset, size_t length, uint64_t iova, int fd, int access) {
    /* As a kernel that knows dmabufs, and no optional flag. */
    if (is_old(pd->context)) {
        errno = EOPNOTSUPP;
    } else if (fd < 0) {
        errno = EBADF;
    } else if (access & IBV_ACCESS_RELAXED_ORDERING) {
        errno = EINVAL;
    } else {
        struct ibv_mr *mr = calloc(1, sizeof *mr);
        mr->context = pd->context, mr->pd = pd, mr->length = length;
        mr->lkey = (uint32_t)offset, mr->rkey = (uint32_t)iova;
        ((struct fake_pd *)pd)->regions++;
        regions++;
        return mr;
    }
    return NULL;
}

int ibv_dereg_mr(struct ibv_mr *mr) {
    ((struct fake_pd *)mr->pd)->regions--;
    regions--;
    free(mr);
    return 0;
}

/* What these tests do not call. */
#define ABSENT(name)                     \
    void absent_##name(void) __asm__(#name); \
    void absent_##name(void) { demand(0, #name " was called"); }
ABSENT(ibv_create_comp_channel)
ABSENT(ibv_destroy_comp_channel)
ABSENT(ibv_create_cq)
ABSENT(ibv_destroy_cq)
ABSENT(ibv_get_cq_event)
ABSENT(ibv_ack_cq_events)
ABSENT(ibv_create_srq)
ABSENT(ibv_modify_srq)
ABSENT(ibv_destroy_srq)
ABSENT(ibv_create_qp)
ABSENT(ibv_modify_qp)
ABSENT(ibv_query_qp)
ABSENT(ibv_destroy_qp)
ABSENT(ibv_get_async_event)
ABSENT(ibv_ack_async_event)
ABSENT(ibv_wc_status_str)
ABSENT(ibv_event_type_str)
ABSENT(ibv_fork_init)
